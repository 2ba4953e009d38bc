"""The `pyvirtio` command: one file for each sub-command."""
