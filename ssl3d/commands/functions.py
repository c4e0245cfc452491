"""Commands as functions: what `ssl3d COMMAND` does on the command line, from Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl3d import plugins
from ssl3d.errors import DataError, TrainingError


def prepare(sources: str | Path | Sequence[str | Path], out: str | Path, **options: Any) -> Path:
    """Make a store of scans, as `ssl3d prepare` does.

    Example:
        >>> store = ssl3d.prepare("scans/", "store.h5", spacing=(1, 1, 1))  # doctest: +SKIP

    Args:
        sources: Folders, scans and lists.
        out: File of the store; a store that was finished from the same scans is left as it is.
        options: Other options of the command, by their names.

    Returns:
        File of the store.

    Raises:
        Ssl3dError: The options cannot be used, or no scan can.
    """
    if _run("prepare", _several(sources), {"out": out, **options}):
        raise DataError(f"{out}: no scan of {' '.join(map(str, _several(sources)))} is usable")
    return Path(out)


def convert_encoder(network: str | Path, out: str | Path, **options: Any) -> Path:
    """Make an encoder of a 2D network or of another toolkit's checkpoint, as `ssl3d convert` does.

    `ssl3d.convert` is the package of `to_3d`, which converts a network that is in memory.

    Example:
        >>> encoder = ssl3d.convert_encoder("resnet18", "encoders/resnet18", kind="acs")  # doctest: +SKIP

    Args:
        network: Name of a 2D network, or file of weights, with options after it.
        out: Folder for the encoder.
        options: Other options of the command, by their names.

    Returns:
        The folder.

    Raises:
        Ssl3dError: The network or the options cannot be used, or the folder exists.
    """
    _run("convert", [network], {"out": out, **options})
    return Path(out)


def embed(
    encoder: str | Path,
    data: str | Path | Sequence[str | Path] = "phantoms",
    out: str | Path = "features.h5",
    **options: Any,
) -> Path:
    """Write the embeddings of volumes into an HDF5 file, as `ssl3d embed` does.

    Example:
        >>> features = ssl3d.embed("runs/first", "store.h5", "features.h5")  # doctest: +SKIP

    Args:
        encoder: Run, its encoder/, or an untrained encoder as scratch:NAME[:kind].
        data: Volumes to embed.
        out: HDF5 file to write.
        options: Other options of the command, by their names.

    Returns:
        The file.

    Raises:
        Ssl3dError: The encoder, the data or the options cannot be used, or the file exists.
    """
    _run("embed", [encoder], {"data": _several(data), "out": out, **options})
    return Path(out)


def finetune(
    encoder: str | Path | Sequence[str | Path],
    data: str | Path | Sequence[str | Path] = "phantoms",
    out: str | Path = "runs/finetune",
    **options: Any,
) -> Path:
    """Train encoders on a downstream task, beside the same network from scratch, as `ssl3d finetune` does.

    Example:
        >>> ssl3d.finetune("runs/first", "store.h5", task="segmentation",
        ...                segmentation={"patch": (32, 64, 64)})  # doctest: +SKIP

    Args:
        encoder: One or several encoders.
        data: Volumes with targets.
        out: Folder for the records, the table and the pictures.
        options: Other options of the command, by their names; those of the task as a dictionary.

    Returns:
        The folder of the records.

    Raises:
        Ssl3dError: The encoders, the data or the options cannot be used, or a training failed.
    """
    if _run("finetune", _several(encoder), {"data": _several(data), "out": out, **options}):
        raise TrainingError(f"{out}: a training failed, as the lines above say")
    return Path(out)


def localize(
    run: str | Path,
    data: str | Path | Sequence[str | Path] = "phantoms",
    out: str | Path = "runs/localize",
    **options: Any,
) -> Path:
    """Place volumes and crops of them along the body, as `ssl3d localize` does.

    Example:
        >>> ssl3d.localize("runs/sorting-1", "store.h5", "where")  # doctest: +SKIP

    Args:
        run: Folder of a run of the proxy `sorting`.
        data: Volumes to place.
        out: Folder for the results.
        options: Other options of the command, by their names.

    Returns:
        The folder of the results.

    Raises:
        Ssl3dError: The run, the data or the options cannot be used.
    """
    _run("localize", [run], {"data": _several(data), "out": out, **options})
    return Path(out)


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Path) else list(value)


def _run(command: str, positional: Sequence[Any], options: dict[str, Any]) -> int:
    """Run a command in this process, and return its exit status."""
    words = [*map(str, positional), *_words(options)]
    return plugins.load(plugins.COMMANDS, command).main(words) or 0


def _words(options: dict[str, Any], section: str = "") -> list[str]:
    """Return options as words of a command line; None leaves an option at its default.

    Example:
        >>> _words({"lr": 0.1, "fractions": (0.1, 1), "dense": True, "sorting": {"slices": 8}})
        ['--lr=0.1', '--fractions', '0.1', '1', '--dense=true', '--sorting.slices=8']
    """
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{section}{name}"
        if value is None:
            continue
        if isinstance(value, dict):
            words += _words(value, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(entry, list | tuple) for entry in value):
            words.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={str(value).lower() if isinstance(value, bool) else value}")
    return words
