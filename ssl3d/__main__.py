"""`python -m ssl3d`, for torchrun."""

from ssl3d.cli import script

script()
