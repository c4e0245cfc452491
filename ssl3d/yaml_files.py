"""YAML as people write it, read within bounds: no alias, depth or length of it can stall a command."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ssl3d.files import check_regular

MOST_VALUES = 100_000
"""Largest number of values in a document, aliases written out."""


class _Loader(yaml.SafeLoader):
    """Loader that takes 2e13 as a number, and refuses a name that is given twice."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _count(node, {}, ())
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:  # YAML would keep the last without a word
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is given twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Dumper that puts a text into quotes where the loader would take it for a number."""


# YAML 1.1, which PyYAML speaks, wants a point in such a number and takes it for a text without.
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _count(node: Any, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Count the values below a node as if every alias were written out.

    Raises:
        YAMLError: There are too many, or a value holds itself.
    """
    if id(node) in above:
        raise yaml.YAMLError("an alias stands inside the value that it means")
    if id(node) not in sizes:
        total = 1
        if isinstance(node, yaml.SequenceNode | yaml.MappingNode):
            inside = (*above, id(node))
            for entry in node.value:
                for child in entry if isinstance(entry, tuple) else (entry,):
                    total += _count(child, sizes, inside)
        sizes[id(node)] = total
    if sizes[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values, aliases written out")
    return sizes[id(node)]


def parse_yaml(text: str) -> Any:
    """Parse a YAML document into plain values.

    Args:
        text: Document; a name that is given twice in a mapping is an error.

    Raises:
        ValueError: The text is not YAML, nests too deeply, or holds too many values.

    Example:
        >>> parse_yaml("budget: {flops: 2e13}")
        {'budget': {'flops': 20000000000000.0}}
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("its values nest too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file into plain values.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML in UTF-8, nests too deeply, or holds too many values.
    """
    check_regular(path)
    return parse_yaml(path.read_text(encoding="utf-8"))


def dump_yaml(values: Any) -> str:
    r"""Write plain values as YAML that `parse_yaml` reads back as they are.

    Example:
        >>> dump_yaml({"name": "1e5", "lr": 0.001})
        "name: '1e5'\nlr: 0.001\n"
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
