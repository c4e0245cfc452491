"""2D networks made 3D: `to_3d`, and encoders from them."""

from ssl3d.convert.network import Converted, to_3d
from ssl3d.convert.report import Entry, Report

__all__ = ["Converted", "Entry", "Report", "to_3d"]
