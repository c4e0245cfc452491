"""Has pretraining seen the test volumes? Hashes of files and voxels that travel in the checkpoint.

Identities (data set, subject) are compared by name, so a scan that was prepared again under another name or
in another folder passes them by. Two more 8-byte hashes per volume do not depend on names:

- of the *source file* and the place in it: finds the same file whatever was done to it afterwards
  (spacing, crop, normalisation);
- of a *reading of the voxels*: the means of 4 x 4 x 4 blocks, scaled to their own range and rounded to 32
  levels (and once more to levels half a step off, as a mean may lie on an edge); finds the same voxels in
  another file, format, precision or data set, with or without mask, and under any linear change of their
  intensities. Volumes of two values are hashed bit by bit.

Neither finds a scan that was *both* stored as another file *and* resampled, cropped, padded, turned,
mirrored or denoised; nor two scans of one person. Different people do not collide in practice: 64 means
would have to agree to 1/32 of their range. Volumes of one value and masks of a few voxels have no reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ssl3d.data.identity import SIZE, reading_of, source_hash

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection
    from ssl3d.data.store.volume import Store

LAZY_VOXELS = 1_000_000_000
"""Most voxels read to hash volumes of stores that were made before stores kept readings."""


def volume_hashes(data: Collection, lazy_voxels: int = LAZY_VOXELS) -> list[frozenset[str]]:
    """Return the hashes of every volume, in order; empty where nothing is known of one.

    Stores keep them since they have `Record.reading`; volumes of older stores are read, as long as they are
    `lazy_voxels` together.
    """
    hashes: list[frozenset[str]] = []
    for volume in data:
        # Every record of a benchmark asks again.
        store, row = volume.place
        kept = _hashed.setdefault(store, {})
        if row in kept:
            hashes.append(kept[row])
            continue
        record = volume.record
        reading = record.reading
        if not reading and (voxels := int(np.prod(volume.shape))) <= lazy_voxels:
            lazy_voxels -= voxels
            reading = reading_of(volume.read().numpy())
        pieces = [reading[at : at + 2 * SIZE] for at in range(0, len(reading), 2 * SIZE)]
        kept[row] = frozenset({*pieces, source_hash(record.sha256, record.source)} - {""})
        hashes.append(kept[row])
    return hashes


def seen_volumes(
    data: Collection, hashes: Iterable[str], lazy_voxels: int = LAZY_VOXELS
) -> NDArray[np.bool_]:
    """Tell which volumes pretraining saw, by file or by voxels, whatever they are called; (N,).

    Args:
        data: Volumes to be tested on.
        hashes: Hashes of a checkpoint, as `hashes_in` gives them.
        lazy_voxels: Most voxels to read, as in `volume_hashes`.
    """
    known = frozenset(hashes)
    if not known:
        return np.zeros(len(data), dtype=bool)
    return np.array([bool(own & known) for own in volume_hashes(data, lazy_voxels)], dtype=bool)


def leak_flags(
    data: Collection,
    identities: Iterable[str],
    hashes: Iterable[str] | None,
    saw_labels: bool,
    complete: bool = True,
) -> dict[str, Any]:
    """Return the flags by which a record reports leaks.

    Args:
        data: Volumes tested on.
        identities: Hashes of the people that pretraining saw (`identity_hash`).
        hashes: Hashes of the volumes it saw; None where the checkpoint does not know.
        saw_labels: Whether pretraining learned from labels.
        complete: Whether the hashes are of all volumes it saw (`hashes_complete`).

    Returns:
        `seen_test_subjects`: people of the test part seen in pretraining, by name or by their scans;
        `seen_test_volumes`: volumes seen by file or voxels, None where it is not known (none found among
        hashes of only some of the volumes is not none); `saw_labels`;
        `ranked`: whether none was seen.
    """
    from ssl3d.data.identity import identity_hash

    known = frozenset(identities)
    people = list(zip(map(str, data.datasets), map(str, data.subjects), strict=True))
    seen = {person for person in set(people) if identity_hash(*person) in known}
    volumes: int | None = None
    if hashes is not None:
        by_voxels = seen_volumes(data, hashes)
        volumes = int(by_voxels.sum()) or (0 if complete else None)
        seen |= {person for person, by_voxel in zip(people, by_voxels, strict=True) if by_voxel}
    return {
        "seen_test_subjects": len(seen),
        "seen_test_volumes": volumes,
        "saw_labels": bool(saw_labels),
        "ranked": not seen,
    }


_hashed: WeakKeyDictionary[Store, dict[int, frozenset[str]]] = WeakKeyDictionary()
