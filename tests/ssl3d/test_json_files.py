"""JSON that nobody would write on purpose is refused by one error, and soon."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssl3d.commands.info import describe
from ssl3d.json_files import parse_json
from ssl3d.training.monitor import trim
from ssl3d.view.curves import read_curves


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "9" * 5000, "{", b"\xff\xfe\x00", ""])
def test_json_that_cannot_be_parsed_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_is_read_in_every_encoding_of_unicode():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert parse_json('{"ä": [1, 2.5]}'.encode(encoding)) == {"ä": [1, 2.5]}


def test_files_are_parsed_by_this_function_alone():
    """`json.loads` raises RecursionError for what is nested deeply; what was just dumped is not."""
    root = Path(__file__).parents[2]
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for folder in ("ssl3d", "benchmarks", "proxies")
        for path in sorted((root / folder).rglob("*.py"))
        if path.name != "json_files.py" and "scripts" not in path.parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bjson\.loads?\(", line) and "json.dumps(" not in line
    ]
    assert not found, found


@pytest.mark.parametrize(
    "odd", [b"[" * 100_000 + b"\n", b"[1]\n", b"\xff\xfe\n", b'{"step": 1e999}\n', b"5\n"]
)
def test_an_odd_line_of_metrics_ends_nothing(tmp_path, odd):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("proxy: [simclr]\n", encoding="utf-8")
    log = run / "metrics.jsonl"
    log.write_bytes(b'{"step": 1, "loss": 2.0}\n' + odd + b'{"step": 2, "loss": 1.0}\n')
    curves, last = read_curves(log)
    assert (curves["loss"].steps, last) == ([1, 2], 2)
    describe(run)
    trim(log, 2)
    assert log.read_text(encoding="utf-8") == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
