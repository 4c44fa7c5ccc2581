"""The benches: one file each, found by what it defines as `BENCH`."""
