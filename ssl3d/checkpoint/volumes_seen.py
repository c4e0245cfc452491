"""Hashes of the volumes that pretraining saw, as they travel in the card of an encoder."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssl3d.data.identity import SIZE
from ssl3d.errors import CheckpointError
from ssl3d.files import check_regular

HASHES = "volumes_seen.bin"
"""File beside `encoder.json`, for hashes that would make it long."""

LONGEST = 1 << 18
"""Most characters of base64 in `encoder.json`: about 10 000 volumes."""


def pack_hashes(hashes: Iterable[str]) -> dict[str, Any]:
    """Pack hashes as `encoder.json` holds them: sorted, 8 bytes each, base64 on one line.

    Example:
        >>> pack_hashes(["ffeeddccbbaa9988"])
        {'count': 1, 'base64': '/+7dzLuqmYg='}
    """
    ordered = sorted(set(hashes))
    content = bytes.fromhex("".join(ordered))
    return {"count": len(ordered), "base64": base64.b64encode(content).decode()}


def unpack_hashes(content: bytes) -> frozenset[str]:
    """Unpack hashes from their bytes."""
    text = content.hex()
    return frozenset(text[at : at + 2 * SIZE] for at in range(0, len(text), 2 * SIZE))


def hashes_in(card: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the hashes of volumes in an encoder's metadata; None where it does not know what it saw.

    They may be of only some of the volumes; `hashes_complete` tells. An encoder that has seen no volumes
    (`scratch:...`, `imagenet:...`) knows that there are none.
    """
    kept = card.get("volumes_seen")
    if isinstance(kept, Mapping) and isinstance(kept.get("base64"), str):
        try:
            return unpack_hashes(base64.b64decode(kept["base64"], validate=True))
        except ValueError:
            return None
    if not card.get("identities") and not card.get("steps") and ("scratch" in card or "imagenet" in card):
        return frozenset()
    return None


def hashes_complete(card: Mapping[str, Any]) -> bool:
    """Tell whether `hashes_in` are of all volumes that an encoder has seen.

    Runs mark their hashes as incomplete where volumes had no reading, or began from an encoder without.
    """
    kept = card.get("volumes_seen")
    return hashes_in(card) is not None and not (isinstance(kept, Mapping) and kept.get("incomplete"))


def hashes_apart(card: dict[str, Any]) -> bytes | None:
    """Take a long list of hashes out of a card, for the file `HASHES`; None where the list is short."""
    kept = card.get("volumes_seen")
    if not isinstance(kept, dict) or len(kept.get("base64", "")) <= LONGEST:
        return None
    content = base64.b64decode(kept["base64"])
    left = {key: value for key, value in kept.items() if key != "base64"}
    card["volumes_seen"] = left | {"file": HASHES, "sha256": hashlib.sha256(content).hexdigest()}
    return content


def hashes_together(card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Put the hashes of the file beside a card back into it.

    Raises:
        CheckpointError: The file is missing or is not the one that the card was written for.
    """
    kept = card.get("volumes_seen")
    if not isinstance(kept, dict) or kept.get("file") != HASHES:
        return card
    path = folder / HASHES
    try:
        check_regular(path)
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != kept.get("sha256"):
        raise CheckpointError(f"{path}: its bytes are not those that encoder.json was written for")
    left = {key: value for key, value in kept.items() if key not in ("file", "sha256")}
    return card | {"volumes_seen": left | {"base64": base64.b64encode(content).decode()}}
