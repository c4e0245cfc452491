"""`ssl3d export`: encoders and fine-tuned models for other programs."""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.export.options import ExportOptions

summary = "write an encoder or a fine-tuned model for another program, checked"

EPILOG = """What was written is opened again, and its outputs are compared with those of ssl3d; a format
whose outputs differ is not kept. Beside the files lies export.json, which says what goes in and what comes
out; ssl3d info OUT prints it. Example: ssl3d export tuned/models/NAME --to monai-bundle --out bundle."""


def main(argv: Sequence[str]) -> int:
    """Write the export, check it, and say where it is."""
    from ssl3d.config import parse

    options = parse("ssl3d export", ExportOptions, argv, epilog=EPILOG).options
    from ssl3d.export.run import export

    for line in export(options).lines():
        print(line)
    return 0
