"""Opens data of any kind as one collection: stores, shards, phantoms, and scans prepared on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl3d.data.scans.read import LISTS, STORES, format_by_suffix, suffix_of
from ssl3d.data.store.collection import Collection
from ssl3d.data.store.remote import Remote, is_address, stores_at
from ssl3d.data.store.volume import Store as Store
from ssl3d.encoder import Encoder
from ssl3d.errors import DataError, UsageError


def open_data(paths: Sequence[str | Path], **prepare_options: Any) -> Collection:
    """Open stores, folders of shards, phantoms or scans as one collection.

    Args:
        paths: Stores (`.h5`); folders that hold only stores; either of them on a server, such as
            `s3://bucket/shards`; `phantoms`, `phantoms:N`,
            `phantoms:N:faint` (lesions that are hard to detect) or `phantoms:N:noise` (nothing to learn);
            or whatever `ssl3d prepare` takes, prepared into a cache ($SSL3D_CACHE, else ~/.cache/ssl3d).
        prepare_options: Options of `prepare`, for scans.

    Raises:
        DataError: A path is missing, unreadable or given twice, or a folder mixes stores and scans.

    Example:
        >>> from ssl3d.api import open_data
        >>> volumes = open_data(["phantoms:4"])
        >>> len(volumes), volumes.dataset_names
        (4, ['phantoms'])
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    stores: list[Path | Remote] = []
    scans: list[Path] = []
    for path in paths:
        text = str(path)
        if text == "phantoms" or text.startswith("phantoms:"):
            from ssl3d.data.phantoms import phantom_store

            count, kind = _phantoms(text)
            stores.append(phantom_store(count, kind=kind))
            continue
        if is_address(path):
            stores += stores_at(path, STORES)
            continue
        behind, is_store = _sort_out(Path(text))
        if is_store:
            stores += behind
        elif Path(text).is_dir() or _holds_many(Path(text)):
            stores.append(_prepared([Path(text)], prepare_options))
        else:
            scans.append(Path(text))
    if scans:  # single files make one store together, not one each
        stores.append(_prepared(scans, prepare_options))
    if not stores:
        raise DataError("no data given: name a store, a folder of scans, or phantoms")
    resolved = [store.resolve() for store in stores]
    for i, place in enumerate(resolved):
        if place in resolved[:i]:
            raise DataError(f"{stores[i]}: given twice; its volumes would count double")
    return Collection([Store(store) for store in stores])


def _sort_out(path: Path) -> tuple[list[Path], bool]:
    """List the stores behind a path, and True; or what to prepare, and False."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        with path.open("rb") as file:
            signed = file.read(8) == b"\x89HDF\r\n\x1a\n"
        return [path], signed or suffix_of(path) in STORES
    if path.name.endswith(".partial"):
        raise DataError(f"{path}: an unfinished store; let `ssl3d prepare` finish it")
    stores, scan = [], None
    for folder, folders, files in os.walk(path):
        for name in [name for name in folders if name.endswith(".partial")]:
            if not (Path(folder) / name.removesuffix(".partial")).exists():
                raise DataError(
                    f"{Path(folder) / name}: an unfinished store; let `ssl3d prepare` finish it"
                )
        folders[:] = sorted(n for n in folders if not n.endswith(".partial") and not n.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            if suffix_of(Path(name)) in STORES:
                stores.append(Path(folder) / name)
            elif scan is None and format_by_suffix(Path(name)) is not None:
                scan = Path(folder) / name
    if stores and scan is not None:
        raise DataError(f"{path}: holds stores ({stores[0].name}) and scans ({scan.name}); give them apart")
    return (stores, True) if stores else ([path], False)


def _holds_many(path: Path) -> bool:
    """Tell whether a file holds or lists many volumes, and so makes a store by itself."""
    form = format_by_suffix(path)
    return suffix_of(path) in LISTS or (form is not None and form.kind == "rows")


def holds_scans(paths: Sequence[str | Path]) -> bool:
    """Tell whether `open_data` would prepare some of these first.

    Raises:
        DataError: A path is missing, or a folder mixes stores and scans.
    """
    named = [str(path) for path in paths]
    files = [
        text
        for text in named
        if text != "phantoms" and not text.startswith("phantoms:") and not is_address(text)
    ]
    return any(not _sort_out(Path(text))[1] for text in files)


def _prepared(paths: list[Path], options: dict[str, Any]) -> Path:
    from ssl3d.data.preparation.prepare import prepare_cached

    return Path(prepare_cached(paths, **options))


def _phantoms(text: str) -> tuple[int, str]:
    """Parse the number of phantoms, and their kind."""
    from ssl3d.data.phantoms import DEFAULT_COUNT, KINDS

    number, _, kind = text.partition(":")[2].partition(":")
    number, kind = (str(DEFAULT_COUNT), number) if number in KINDS else (number or str(DEFAULT_COUNT), kind)
    if not number.isdigit() or int(number) < 1 or kind not in ("", *KINDS):
        raise DataError(f"{text}: expected phantoms:N, phantoms:N:faint or phantoms:N:noise with N from 1")
    return int(number), kind or "plain"


def open_data_for(encoders: Sequence[Encoder], paths: Sequence[str | Path]) -> Collection:
    """Open data for trained encoders, with raw scans prepared as the encoders' own data were.

    Args:
        encoders: Encoders that will read the data.
        paths: Stores, folders, phantoms or scans, as `open_data` takes them.

    Raises:
        UsageError: There are raw scans, and the encoders' data were prepared differently.
        DataError: The data cannot be opened or prepared.
    """
    if not holds_scans(paths):
        return open_data(paths)
    options = prepare_options_of(encoders)
    if options:
        listed = ", ".join(f"{key} {value}" for key, value in options.items())
        print(f"raw scans are prepared as the encoder's own data were: {listed}", file=sys.stderr)
    return open_data(paths, **options)


def prepare_options_of(encoders: Sequence[Encoder]) -> dict[str, Any]:
    """Return the options that prepare raw scans as the data of these encoders were, for `open_data`.

    The options are those that differ from the defaults of `ssl3d prepare`. A median spacing is the one that
    it came to; where several data sets had each their own, the scans get theirs too.

    Raises:
        UsageError: The data of two encoders, or two stores of one, were prepared differently.
    """
    recipes: list[dict[str, Any]] = []
    for encoder in encoders:
        for settings in getattr(encoder, "metadata", {}).get("preprocessing") or []:
            given = settings.get("options")
            if not isinstance(given, dict):
                continue  # phantoms, and stores that no `prepare` made
            own = kept_options(given, settings.get("spacing"), encoder.config.in_channels)
            if own not in recipes:
                recipes.append(own)
    if len(recipes) > 1:
        both = " and ".join(json.dumps(own) for own in recipes[:2])
        raise UsageError(
            f"the encoders' own data were prepared differently ({both}): make a store of the scans with "
            "`ssl3d prepare` and give it to --data"
        )
    return recipes[0] if recipes else {}


def kept_options(given: Mapping[str, Any], spacing: Any, in_channels: int) -> dict[str, Any]:
    """Select the options that prepare a scan as a store's were: those that are not at their defaults.

    Args:
        given: Options that the store was prepared with.
        spacing: Spacing that a median came to; of several data sets that of each, by name.
        in_channels: Channels of the network that will read the scan.
    """
    from ssl3d.data.preparation.options import PrepareOptions

    kept = ("spacing", "normalize", "nan", "window", "crop_foreground", "colour", "frames")
    defaults = {field.name: field.default for field in dataclasses.fields(PrepareOptions)}
    own = {key: given[key] for key in kept if key in given}
    if own.get("spacing") == "median" and not isinstance(spacing, dict):
        own["spacing"] = spacing or "keep"
    if in_channels == 1:  # colours were read as slices: it takes grey pictures
        own.pop("colour", None)
    return {key: value for key, value in own.items() if value != defaults[key]}
