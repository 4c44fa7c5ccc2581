"""The tools for adapter files, found by discovery: one file each, which defines `TOOL`."""
