"""From a folder or an archive of records to a page, Markdown and CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ssl3d.api import (
    UsageError,
    write_whole,
)

if TYPE_CHECKING:
    from ssl3d_benchmarks.leaderboard.report.board import Board
    from ssl3d_benchmarks.leaderboard.report.overall import Overall
    from ssl3d_benchmarks.leaderboard.report.records import Read, Records

PUBLISHED = Path(__file__).parents[2] / "suites" / "published"


@dataclass(frozen=True)
class ReportOptions:
    """Makes a report of records: one HTML page that needs nothing else, Markdown and CSV.

    Attributes:
        results: Folders of records, as benchmarks write them, or archives of `ssl3d leaderboard pack`;
            everything below is read.
        out: Folder for index.html, report.md and scores.csv.
        title: Of the page.
        published: Published numbers to show beside, never ranked: names of those that come with ssl3d
            (medmnist3d), or YAML files.
        resamples: Bootstrap resamples.
        pictures: Whether pictures that lie beside the records are put into the page.
    """

    results: tuple[Path, ...] = field(metadata={"positional": True})
    out: Path = Path("runs/report")
    title: str = "Leaderboard"
    published: tuple[str, ...] = ("medmnist3d",)
    resamples: int = 2000
    pictures: bool = True

    def __post_init__(self) -> None:
        """Checks every field."""
        if not self.results:
            raise ValueError("results: name a folder of records")
        if self.resamples < 100:
            raise ValueError(f"resamples: {self.resamples}; at least 100")


@dataclass(frozen=True)
class Report:
    """What a report says, as numbers.

    Attributes:
        boards: One table each.
        overall: Ranks over tasks.
        records: What was read, and what was refused.
    """

    boards: list[Board]
    overall: list[Overall]
    records: Records


def read_report(
    results: Sequence[Path], published: Sequence[str] = ("medmnist3d",), resamples: int = 2000
) -> Report:
    """Reads records and computes everything that a report says.

    Raises:
        UsageError: A folder is missing or holds no records; published numbers cannot be read.
    """
    from ssl3d_benchmarks.leaderboard.report.overall import overall_of
    from ssl3d_benchmarks.leaderboard.report.records import read_records
    from ssl3d_benchmarks.leaderboard.report.statistics import boards_of

    records = read_records(results, [_published(name) for name in published])
    boards = [board for table in records.tables for board in boards_of(table, resamples)]
    boards.sort(
        key=lambda board: (board.table.protocol, board.table.family, board.table.title, -board.fraction)
    )
    return Report(boards, overall_of(boards), records)


def report(options: ReportOptions) -> Report:
    """Writes the page, the Markdown and the CSV.

    Raises:
        UsageError: As `read_report`, or the folder cannot be written.
    """
    from ssl3d_benchmarks.leaderboard.report.answer import answer
    from ssl3d_benchmarks.leaderboard.report.overall import no_overall
    from ssl3d_benchmarks.leaderboard.report.page import page
    from ssl3d_benchmarks.leaderboard.report.text import csv_text, markdown_text

    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: not a folder")
    made = read_report(options.results, options.published, options.resamples)
    told = conditions(made, options)
    refused = made.records.refused
    contents = {
        "index.html": page(options.title, made.boards, made.overall, refused, told, options.pictures),
        "report.md": markdown_text(options.title, made.boards, made.overall, refused, told),
        "scores.csv": csv_text(made.boards),
    }
    try:
        for name, content in contents.items():
            # Workers that end together write the same report: none may be read half written.
            write_whole(options.out / name, content)
    except OSError as error:
        raise UsageError(f"--out {options.out}: {error.strerror}") from error
    for line in [*answer(made.boards), *no_overall(made.boards)]:
        print(line)
    for one in refused:
        print(f"refused: {one.where}{': ' + one.who if one.who else ''}: {one.why}")
    rows = sum(len(table.rows) for table in made.records.tables)
    print(
        f"{rows} records in {len(made.records.tables)} tables, {len(refused)} refused: "
        f"{options.out / 'index.html'}"
    )
    return made


def conditions(made: Report, options: ReportOptions) -> list[tuple[str, str]]:
    """What the numbers were made with."""
    rows = [one for table in made.records.tables for one in table.rows]
    found = [("files read", str(made.records.files)), ("records", str(len(rows)))]
    names = sorted({name for one in rows for name in one.result.versions})
    for name in names:
        found.append((name, _counted(one.result.versions.get(name, "unknown") for one in rows)))
    found.append(
        ("devices of pretraining", _counted(_device(one) for one in rows if one.kind == "pretrained"))
    )
    found.append(("seeds of the protocols", _counted(str(one.result.seed) for one in rows)))
    found.append(("precision of frozen encoders", _counted(_precision(one) for one in rows)))
    found.append(("bootstrap resamples", str(options.resamples)))
    found += [
        (f"split and data of {table.title}",
         f"split {table.rows[0].result.split_digest}, data {table.rows[0].result.data_digest}")
        for table in made.records.tables
    ]  # fmt: skip
    return [(name, value) for name, value in found if value]


def _device(one: Read) -> str:
    compute = one.pretraining.get("compute") or {}
    return str(compute.get("where", "not said"))


def _precision(one: Read) -> str:
    return str(one.result.settings.get("precision", "")) or "not said"


def _counted(values: Iterable[str]) -> str:
    counts = Counter(map(str, values))
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({number} records)" for value, number in counts.most_common())


def _published(name: str) -> Path:
    own = PUBLISHED / f"{name}.yaml"
    if own.is_file():
        return own
    path = Path(name)
    if path.is_file():
        return path
    there = ", ".join(sorted(one.stem for one in PUBLISHED.glob("*.yaml")))
    raise UsageError(f"--published {name}: no such file, and none of {there}")
