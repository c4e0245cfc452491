"""A leaderboard of before: its report says the same numbers, and none of its jobs is done anew."""

import csv
import shutil

OF_INTERVALS = (
    *("rank_low", "rank_high", "first_share", "low", "high", "error", "detectable", "notes"),
    *(f"gain_{end}" for end in ("low", "high", "error", "p", "p_holm", "detectable")),
    *(f"imagenet_{end}" for end in ("low", "high", "p_holm")),
)
"""Columns that an interval, a test or the resampling of ranks fills."""


def rows(path):
    """The rows of a table, numbers as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text


def test_the_report_says_the_same_numbers(place, made):
    shutil.move(place / "report", place / "before")
    made.ssl3d(made.REPORT)
    now, before = rows(place / "report" / "scores.csv"), rows(place / "before" / "scores.csv")
    assert before
    for old, new in zip(before, now, strict=True):
        # Columns may have been added since; and no interval, test or range is given any more of classes
        # with fewer than five test subjects, nor of a gain over one untrained seed.
        refused = {key for key in OF_INTERVALS if new[key] == "" and new["seeds"] == 1}
        kept = [key for key in old if key not in refused]
        made.close(*({key: row[key] for key in kept} for row in (new, old)), rel=1e-9, abs=1e-12)


def test_a_suite_that_is_done_has_no_job_left(place, made, capsys):
    def files():
        found = [path for path in (place / "board").rglob("*") if path.is_file()]
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in found
            if path.relative_to(place / "board").parts[0] != "report"
        }

    shutil.copy(place / "store.h5", place / "board" / "work" / "people.h5")
    before = files()
    made.ssl3d(made.BOARD)
    assert files() == before
    assert (place / "board" / "report" / "scores.csv").is_file()
