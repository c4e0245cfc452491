"""JSON of any origin, parsed or refused with one kind of error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, whatever its encoding in Unicode.

    Raises:
        ValueError: The text is no JSON, is nested too deeply, or has a number of too many digits.

    Example:
        >>> parse_json('{"labels": [0, 1]}')
        {'labels': [0, 1]}
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object of plain JSON values with the digest of all that it says, under `digest`."""
    return {**content, "digest": _digest(content)}


def was_changed(content: Mapping[str, Any]) -> bool:
    """Say whether an object says something else than its digest was made of; False where it has none."""
    return content.get("digest") is not None and _digest(content) != content["digest"]


def _digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
