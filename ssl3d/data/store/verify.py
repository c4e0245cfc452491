"""Reads all of a store, and compares it with its hashes, check sums and records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ssl3d.data.store.volume import Store, Volume
from ssl3d.errors import DataError


def damage_of(store: Store) -> Iterator[str]:
    """Read all of a store, in little memory, and yield a line for each part of it that is damaged.

    A store made before stores had check sums is compared with the hash of each volume's content, and its
    index with the records; its foreground maps, settings and counts have neither.

    Args:
        store: Store, whose index was compared with its digest when it was opened.

    Raises:
        OSError: The disk or memory failed, which says nothing of the store.
    """
    for name in ("settings", "fingerprint", "rejected"):
        try:
            getattr(store, name)
        except DataError as error:
            yield str(error)
    for number in range(len(store)):
        try:
            fault = _fault_of(Volume(store, number, number))
        except DataError as error:
            fault = str(error)
        if fault:
            yield fault


def _fault_of(volume: Volume) -> str:
    """Return what is wrong with a volume; empty where nothing is.

    Raises:
        DataError: Part of it cannot be read.
    """
    store, number = volume.place
    content = volume.content()
    volume.foreground(), volume.box_labels, volume.background
    row, record = store.rows[number], volume.record
    where = f"{store.path}: {volume.dataset}/{volume.id}"
    if record.voxels and content != record.voxels:
        return f"{where} is damaged: its voxels, mask or boxes are not those that were written"
    known: dict[str, tuple[Any, Any]] = {
        "name": (volume.id, record.id),
        "data set": (volume.dataset, record.dataset),
        "subject": (volume.subject, record.subject),
        "split": (volume.split, record.split),
        "orientation": (volume.orientation, record.orientation),
        "label": (volume.label, record.label),
        "spacing": (volume.spacing, record.spacing),
        "hash": (row["content"].tobytes().hex(), record.voxels or "00" * 16),
    }
    for name, (own, recorded) in known.items():
        if own != recorded:
            return f"{where} is damaged: its {name} is {own!r} in the index and {recorded!r} in its record"
    return ""
