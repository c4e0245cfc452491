"""JSON and YAML that nobody would write on purpose are refused by one error, and soon."""

from __future__ import annotations

import pytest
import yaml

from ssl3d.documents import parse_json, parse_yaml


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "9" * 5000, "{", b"\xff\xfe\x00", ""])
def test_json_that_cannot_be_parsed_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000 + "]" * 5000,
        "steps: " + "9" * 5000,
        "a: [",
        "a: !!python/object:os.x {}",
        "a\n---\nb",
    ],
)
def test_yaml_that_cannot_be_parsed_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_yaml(text)


def test_aliases_are_bounded():
    """Nine levels of nine: 300 bytes that stand for 400 million values."""
    lines = ["x: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"y{i}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(9)]
    with pytest.raises(ValueError, match="more than 1,000,000 values"):
        parse_yaml("\n".join(lines))
    with pytest.raises(ValueError, match="holds itself"):
        parse_yaml("a: &a [*a]")


@pytest.mark.parametrize("text", ["a: &x [1, 2]\nb: *x", "", "null", "a: {b: [1, 2.5, yes]}"])
def test_plain_yaml_is_read_as_ever(text):
    assert parse_yaml(text) == yaml.safe_load(text)
