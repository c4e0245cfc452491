"""The built-in benchmarks: one file, one protocol."""
