"""JSON that nobody would write on purpose is refused by one error, and soon."""

from __future__ import annotations

import pytest

from ssl3d.json_files import parse_json


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "9" * 5000, "{", b"\xff\xfe\x00", ""])
def test_json_that_cannot_be_parsed_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_is_read_in_every_encoding_of_unicode():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert parse_json('{"ä": [1, 2.5]}'.encode(encoding)) == {"ä": [1, 2.5]}
