"""From a folder or an archive of records to a page, Markdown and CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ssl3d.api import (
    UsageError,
    not_written,
    write_whole,
)

if TYPE_CHECKING:
    from ssl3d.api import Result
    from ssl3d_benchmarks.leaderboard.report.board import Board
    from ssl3d_benchmarks.leaderboard.report.overall import Overall
    from ssl3d_benchmarks.leaderboard.report.records import ReadRecord, Records

PUBLISHED = Path(__file__).parents[2] / "suites" / "published"


@dataclass(frozen=True)
class ReportOptions:
    """Write a report of records: one HTML page that needs no other file, Markdown and CSV.

    Attributes:
        results: Folders of records, as benchmarks write them, or archives of `ssl3d leaderboard pack`. All
            records below them are read.
        out: Folder for index.html, report.md and scores.csv.
        title: Title of the page.
        published: Published numbers that are shown beside the records and never ranked: names of those that
            come with ssl3d (medmnist3d), or YAML files.
        resamples: Number of bootstrap resamples.
        pictures: Whether the page shows pictures that lie beside the records.
    """

    results: tuple[Path, ...] = field(metadata={"positional": True})
    out: Path = Path("runs/report")
    title: str = "Leaderboard"
    published: tuple[str, ...] = ("medmnist3d",)
    resamples: int = 2000
    pictures: bool = True

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.results:
            raise ValueError("results is empty: name a folder of records")
        if self.resamples < 100:
            raise ValueError(f"resamples is {self.resamples}, must be at least 100")


@dataclass(frozen=True)
class Report:
    """Numbers of which a report is written.

    Attributes:
        boards: Tables with their numbers, one for each fraction of the labels.
        overall: Ranks over tasks.
        records: Records that were read, and those that were refused.
    """

    boards: list[Board]
    overall: list[Overall]
    records: Records


def read_report(
    results: Sequence[Path], published: Sequence[str] = ("medmnist3d",), resamples: int = 2000
) -> Report:
    """Read records and compute everything that a report says.

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
    """Write the page, the Markdown and the CSV.

    Raises:
        UsageError: As `read_report`, or the folder cannot be written.
        TransientError: The disk is full.
    """
    from ssl3d_benchmarks.leaderboard.report.answer import answer
    from ssl3d_benchmarks.leaderboard.report.overall import no_overall
    from ssl3d_benchmarks.leaderboard.report.page import page
    from ssl3d_benchmarks.leaderboard.report.text import csv_text, markdown_text
    from ssl3d_benchmarks.task import show

    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: not a folder")
    numbers = read_report(options.results, options.published, options.resamples)
    made_with = conditions(numbers, options)
    refused = numbers.records.refused
    contents = {
        "index.html": page(
            options.title,
            numbers.boards,
            numbers.overall,
            refused,
            made_with,
            options.pictures,
            options.resamples,
        ),
        "report.md": markdown_text(options.title, numbers.boards, numbers.overall, refused, made_with),
        "scores.csv": csv_text(numbers.boards),
    }
    try:
        for name, content in contents.items():
            # Workers that end together write the same report: none may be read half written.
            write_whole(options.out / name, content)
    except OSError as error:
        raise not_written(error, f"--out {options.out}: {error.strerror}") from error
    for line in [*answer(numbers.boards), *no_overall(numbers.boards)]:
        show(line)
    for record in refused:
        show(f"refused: {record.where}{': ' + record.who if record.who else ''}: {record.why}")
    rows = sum(len(table.rows) for table in numbers.records.tables)
    show(
        f"{rows} records in {len(numbers.boards)} table{'s' * (len(numbers.boards) != 1)}, "
        f"{len(refused)} refused: "
        f"{options.out / 'index.html'}"
    )
    return numbers


def conditions(numbers: Report, options: ReportOptions) -> list[tuple[str, str]]:
    """List the names and values of what the numbers were made with."""
    tables = numbers.records.tables
    rows = [record for table in tables for record in table.rows]
    versions = sorted({name for record in rows for name in record.result.versions})
    devices = [_device(record) for record in rows if record.kind == "pretrained"]
    pairs = [
        ("files read", str(numbers.records.files)),
        ("records", str(len(rows))),
        *((name, _counted(row.result.versions.get(name, "unknown") for row in rows)) for name in versions),
        ("devices of pretraining", _counted(devices)),
        ("seeds of the protocols", _counted(str(record.result.seed) for record in rows)),
        ("precision of frozen encoders", _counted(_precision(record) for record in rows)),
        ("bootstrap resamples", str(options.resamples)),
        *((f"split and data of {table.title}", _digests(table.rows[0].result)) for table in tables),
    ]
    return [(name, value) for name, value in pairs if value]


def _digests(result: Result) -> str:
    return f"split {result.split_digest}, data {result.data_digest}"


def _device(record: ReadRecord) -> str:
    compute = record.pretraining.get("compute") or {}
    return str(compute.get("where", "unknown"))


def _precision(record: ReadRecord) -> str:
    return str(record.result.settings.get("precision", "")) or "unknown"


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
    there = ", ".join(sorted(path.stem for path in PUBLISHED.glob("*.yaml")))
    raise UsageError(f"--published {name}: no such file, and none of {there}")
