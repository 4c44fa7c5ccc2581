"""One file for each kind of change a layer of an adapter file can hold; each defines `KIND`."""
