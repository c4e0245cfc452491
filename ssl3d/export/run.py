"""The work of `ssl3d export`: a format's files, checked, in a folder that appears whole or not at all."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl3d.amounts import size as byte_size
from ssl3d.checkpoint.card import plain_value, versions
from ssl3d.errors import UsageError, is_full, not_written
from ssl3d.export.options import ExportOptions
from ssl3d.export.source import Source, read_source
from ssl3d.files import whole_folder

ABOUT = "export.json"
"""File beside every export that says what it is, what goes in and what comes out."""

WRITERS = {
    "onnx": "ssl3d.export.graphs:write_onnx",
    "torch-export": "ssl3d.export.graphs:write_program",
    "hf": "ssl3d.export.hub:write_hub",
    "monai-bundle": "ssl3d.export.bundle:write_bundle",
    "timm": "ssl3d.export.timm_folder:write_timm",
    "nnunet": "ssl3d.export.nnunet:write_nnunet",
}
"""Format -> module:function of (source, folder, options) that returns what `export.json` says of them."""


@dataclass(frozen=True)
class Written:
    """What an export came to.

    Attributes:
        folder: Folder of the files.
        files: Name and size in bytes of each file.
        about: Content of `export.json`.
    """

    folder: Path
    files: tuple[tuple[str, int], ...]
    about: dict[str, Any]

    def lines(self) -> list[str]:
        """Return what the command prints."""
        apart = self.about["largest_difference"]
        shape = self.about.get("input", {}).get("shape")
        sides = " x ".join("any" if side is None else str(side) for side in shape or ())
        return [
            *(f"{self.folder / name}  {byte_size(count)}" for name, count in self.files),
            *([f"takes batch x channel x D x H x W: {sides}"] if shape else []),
            f"largest difference from ssl3d's own outputs: {apart:.2g}",
            *([f"uploaded to {self.about['address']}"] if "address" in self.about else []),
        ]


def export(options: ExportOptions) -> Written:
    """Export an encoder or a model as the options say.

    Raises:
        CheckpointError: It is missing or damaged.
        TrainingError: The outputs of what was written differ.
        TransientError: The disk is full.
        UsageError: The format cannot hold it, an option does not go with it, or --out exists or cannot be
            written.
    """
    out = options.out or Path(f"{Path(options.source).name}-{options.to}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: a file, not a folder")
    if out.exists() and not (options.overwrite and (out / ABOUT).is_file()):
        raise UsageError(f"--out {out}: exists (--overwrite replaces an export)")
    module, _, name = WRITERS[options.to].partition(":")
    write: Callable[[Source, Path, ExportOptions], dict[str, Any]] = getattr(
        importlib.import_module(module), name
    )
    source = read_source(options.source)
    try:
        with whole_folder(out) as folder:
            about = {
                "format": options.to,
                **write(source, folder, options),
                "preprocessing": source.card.get("preprocessing"),
                "card": source.public_card(),
                "versions": versions(),
            }
            text = json.dumps(about, indent=1, default=plain_value) + "\n"
            (folder / ABOUT).write_text(text, encoding="utf-8")
    except OSError as error:
        why = "no space left on the disk" if is_full(error) else error.strerror or error
        raise not_written(error, f"{out}: cannot be written ({why})") from error
    files = tuple((str(path.relative_to(out)), path.stat().st_size)
                  for path in sorted(out.rglob("*")) if path.is_file())  # fmt: skip
    if options.push:
        from ssl3d.export.hub import push

        about["address"] = push(out, options.push)
    return Written(out, files, about)
