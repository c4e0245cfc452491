"""JSON of any origin, parsed or refused with one kind of error."""

from __future__ import annotations

import json
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
