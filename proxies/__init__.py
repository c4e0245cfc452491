"""The built-in proxy tasks: one file, one plugin."""
