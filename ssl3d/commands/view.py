"""`ssl3d view`: a page to look at, of a store, a run or predictions."""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.view.options import ViewOptions

summary = "write a page to look at: of a store, a run or predictions"

EPILOG = """The page is one file of HTML. It loads nothing, so it can be mailed, and opened off the network.
Of a store it shows slices of every volume with masks and boxes; of a run its curves and pictures; of a
folder of ssl3d finetune its scores; of predictions the scan, the truth and the prediction, the worst first.
Example: ssl3d view predicted --data labelled.csv --out predicted.html."""


def main(argv: Sequence[str]) -> None:
    """Write the page, and say where it is."""
    from ssl3d.amounts import size
    from ssl3d.config import parse

    options = parse("ssl3d view", ViewOptions, argv, epilog=EPILOG).options
    from ssl3d.view.run import view

    said = view(options)
    print(f"{options.out}: {said}, {size(options.out.stat().st_size)}")
