"""JSON and YAML of any origin: parsed, or refused with one kind of error."""

from __future__ import annotations

import json
from typing import Any

_MOST_NODES = 1_000_000  # of a YAML document, with what its aliases stand for


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


def parse_yaml(text: str, loader: Any = None) -> Any:
    """Parse YAML of plain values, whose aliases may not blow it up.

    Args:
        text: One document.
        loader: Class of a loader instead of `yaml.SafeLoader`, of which it is a kind.

    Raises:
        ValueError: The text is no YAML, is nested too deeply, stands for more than a million values by its
            aliases, or has a number of too many digits.

    Example:
        >>> parse_yaml("crop: [24, 32, 32]")
        {'crop': [24, 32, 32]}
    """
    import yaml

    reader = (loader or yaml.SafeLoader)(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return reader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        reader.dispose()


def _count(node: Any, known: dict[int, int]) -> int:
    """Count the values that a node stands for, an alias as all that it repeats.

    Raises:
        ValueError: There are too many, or the node holds itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias that holds itself")
        return known[id(node)]
    known[id(node)] = 0  # not known yet: being counted
    count = 1
    if not isinstance(node.value, str):
        for entry in node.value:
            for member in entry if isinstance(entry, tuple) else (entry,):
                count += _count(member, known)
    if count > _MOST_NODES:
        raise ValueError(f"aliases that stand for more than {_MOST_NODES:,} values")
    known[id(node)] = count
    return count
