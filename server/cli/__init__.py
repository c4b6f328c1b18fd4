"""The command line: `nybble` and `serve`."""
