"""A leaderboard of before: its report says the same numbers, and none of its jobs is done anew."""

import csv
import shutil


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
    now = [{key: row[key] for key in before[0]} for row in now]  # columns may have been added since
    made.close(now, before, rel=1e-9, abs=1e-12)


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
