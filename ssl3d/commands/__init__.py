"""Subcommands of `ssl3d`; each module has `summary` and `main(argv)`."""
