"""A leaderboard as one HTML page: nothing is loaded, it works without scripts, on a phone, in the dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ssl3d.api import beside, charts, document, elements, statistics
from ssl3d_benchmarks.leaderboard.report import figures, overview, text
from ssl3d_benchmarks.leaderboard.report.answer import ahead_of_networks, answer
from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.columns import (
    Column,
    number,
    score_columns,
    settings_of,
    shown_columns,
)
from ssl3d_benchmarks.leaderboard.report.methods import methods_paragraph
from ssl3d_benchmarks.leaderboard.report.overall import Overall, no_overall
from ssl3d_benchmarks.leaderboard.report.records import Refused

MOST_COMPARED = 20
"""Most methods for the table of how often each is above each other."""

HOW_TO_READ = (
    "A score is the mean over seeds and subsets of the training subjects. Its 95 % confidence interval "
    "(CI) resamples test subjects, seeds and subsets: a bootstrap, corrected for bias and skew, and "
    "widened by Student's t where there are few seeds or subsets. With fewer than about twenty test "
    "subjects, the interval cannot contain a rare failure that none of them shows.",
    "Gains are paired differences: both contestants are scored on the same resamples of the same subjects. "
    "A gain is taken over the same network untrained (probes) or trained from scratch (fine-tuning). Where "
    "that network was scored with and without recalibrated normalisation, the better one counts.",
    "The adjusted p comes from Student's t on the error of the gain, with Holm's correction over all tests "
    "of the table. Before the correction, p < .05 exactly where the interval excludes 0. The best ImageNet "
    "conversion is chosen by its score on the same test subjects.",
    "The detectable gain is the smallest true gain that a test at alpha .05 finds with a power of 0.8: "
    "t[.975] + t[.8] standard errors, at the degrees of freedom of the gain. With fewer than three "
    "degrees of freedom it is not given.",
    "The range in brackets after a rank holds 95 % of the ranks over resamples of subjects, with seeds and "
    "subsets drawn as they were seen to vary. It is surer than the interval of a gain, which also counts "
    "how little a few seeds and subsets tell of their variance. Where they disagree, the gain decides. "
    "Rows without a network, published numbers, and encoders whose pretraining saw test subjects have no "
    "rank. Encoders pretrained with labels are ranked among themselves.",
    "FLOPs, time and memory are those of one pretraining: the time is the mean over all seeds of a "
    "contestant, the memory the largest.",
    "In the charts, a circle is a pretrained encoder, a square an ImageNet conversion, a diamond a network "
    "untrained or from scratch, a triangle a row without a network, and a cross a published number. The "
    "dashed line is the untrained or from-scratch row.",
)


def page(
    title: str, boards: Sequence[Board], overall: Sequence[Overall], refused: Sequence[Refused],
    conditions: Sequence[tuple[str, str]], pictures: bool = True, resamples: int = statistics.RESAMPLES,
) -> str:  # fmt: skip
    """Write the report as a page of HTML.

    Args:
        title: Title of the page.
        boards: Tables of contestants.
        overall: Ranks over tasks.
        refused: Rows that are in no table.
        conditions: Names and values of what the numbers were made with.
        pictures: Whether the PNGs beside the records are shown.
        resamples: Number of bootstrap resamples.
    """
    full = answer(boards)
    parts = [f"<h1>{escape(title)}</h1>", '<section class="answer" aria-label="Answer">']
    parts.append("<p><strong>Does pretraining pay on these data?</strong></p>")
    parts += elements.paragraphs(overview.in_short(boards))
    parts.append("</section>")
    parts.append(_top_warnings([*(line for line in full if line.startswith("WARNING")), *_loud(boards)]))
    parts += [overview.matrix(boards), overview.gains(boards)]
    inside = "".join(elements.paragraphs(full))
    parts.append(f'<details class="paper"><summary>The answer in full</summary>{inside}</details>')
    points = "".join(f"<li>{escape(point)}</li>" for point in HOW_TO_READ)
    parts.append(f"<details><summary>How to read the numbers</summary><ul>{points}</ul></details>")
    paragraph = methods_paragraph(boards, resamples)
    parts.append(
        '<details id="methods" class="paper"><summary>Methods, to paste into a paper</summary>'
        f'<p class="copy">{escape(paragraph)}</p></details>'
    )
    parts.append(_contents(boards, overall))
    parts += [_overall(ranks) for ranks in overall]
    parts += elements.small(no_overall(boards))
    if boards:
        parts.append("<h2>Tables</h2>")
    for board in boards:
        parts.append(_board(board, *_curves_at(board, boards), pictures))
    parts += [_refused(refused), _conditions(conditions)]
    style, script = (beside(__package__, name) for name in ("page.css", "page.js"))
    return document(title, "\n".join(parts), [style], [script])


def _loud(boards: Sequence[Board]) -> list[str]:
    """Warn of leaks, of unequal tuning, and of baselines that no table has."""
    lines = []
    leaked = sorted(
        {arm.title for board in boards for arm in board.arms if "pretraining saw" in arm.why_unranked}
    )
    if leaked:
        lines.append(
            f"Leak: the pretraining of {', '.join(leaked)} saw test subjects. These contestants are "
            "shown but not ranked."
        )
    if boards and not any(board.of_kind("imagenet") for board in boards):
        lines.append(
            "These records contain no ImageNet conversion, so they cannot say whether ImageNet weights "
            "would do as well as pretraining."
        )
    unequal = [
        text.heading(board) for board in boards if any("tuning is unequal" in x for x in board.missing)
    ]
    if unequal:
        lines.append(f"Unequal tuning: {'; '.join(unequal)}. A gain there may come from the tuning.")
    bare = [text.heading(board) for board in boards if not board.of_kind("scratch")]
    if bare:
        lines.append(
            f"There is no untrained or from-scratch row: {'; '.join(bare)}. No score there can be called a "
            "gain."
        )
    return lines


def _contents(boards: Sequence[Board], overall: Sequence[Overall]) -> str:
    links = [
        *((_slug(ranks), f"Overall: {ranks.family} ({ranks.protocol})") for ranks in overall),
        *((board.slug, text.heading(board)) for board in boards),
        ("refused", "Refused records"),
        ("conditions", "Conditions"),
    ]
    items = "".join(f'<li><a href="#{slug}">{escape(words)}</a></li>\n' for slug, words in links)
    return f"<nav aria-label='Contents'><ul>\n{items}</ul></nav>"


def _curves_at(board: Board, boards: Sequence[Board]) -> tuple[Sequence[Board], Sequence[Board]]:
    """Return the boards over whose fractions, and over whose annotated slices, a board shows a curve.

    Each curve is shown once: over fractions at the largest, over slices at the most.
    """
    same = [other for other in boards if other.table is board.table]
    sparse = [
        other
        for other in boards
        if other.fraction == board.fraction and other.table.but_for_slices == board.table.but_for_slices
    ]
    sparse.sort(key=lambda other: other.table.slices or float("inf"))
    return same if board is same[0] else [board], sparse if board is sparse[-1] else []


# Sections -----------------------------------------------------------------------------------------


def _overall(ranks: Overall) -> str:
    parts = [f'<section><h2 id="{_slug(ranks)}">{escape(text.heading_over_tasks(ranks))}</h2>']
    tasks = [board.table.title.partition(":")[0] for board in ranks.boards]
    if len(set(tasks)) < len(tasks):
        tasks = [board.table.title for board in ranks.boards]
    rows = []
    for k, name in enumerate(ranks.methods):
        low, high = ranks.intervals[k]
        cells = [
            elements.Cell(f"{ranks.average[k]:.2f} [{low:.2f}, {high:.2f}]", ranks.average[k]),
            elements.Cell(f"{ranks.first_share[k]:.0%}", ranks.first_share[k]),
            *(elements.Cell(f"{rank:g}", rank) for rank in ranks.ranks[k]),
        ]
        rows.append(elements.Row(name, cells))
    parts.append(elements.table(
        "Average rank over tasks, 1 is best. The 95 % range resamples subjects and seeds within tasks.",
        ["method", "average rank [95 % range]", "first in", *tasks], rows,
    ))  # fmt: skip
    parts += elements.paragraphs([text.stability(ranks)])
    parts += elements.small([text.OVER_TASKS])
    if ranks.left_out or ranks.tasks_left_out:
        gone, missing = len(ranks.tasks_left_out), len(ranks.left_out)
        tasks_gone = f"{gone} task{'s do' if gone > 1 else ' does'} not count; " if gone else ""
        were = "contestants were" if missing != 1 else "contestant was"
        parts.append(
            f"<details{' open' * bool(gone)}><summary>{tasks_gone}{missing} {were} not scored on every task"
            f"</summary><p>{escape(text.left_out(ranks))}</p></details>"
        )
    if ranks.critical is not None:
        picture = charts.critical(
            ranks.methods, list(ranks.average), ranks.critical.difference, ranks.critical.cliques,
            "Critical-difference picture: " + text.stability(ranks),
        )  # fmt: skip
        caption = "Average ranks. A bar joins methods that Nemenyi's test cannot tell apart at .05."
        parts.append(elements.figure(picture, caption))
    if len(ranks.methods) <= MOST_COMPARED:
        parts.append("<details><summary>How often each method is above each other</summary>")
        parts += [_above(ranks), "</details>"]
    parts.append("</section>")
    return "\n".join(parts)


def _above(ranks: Overall) -> str:
    """Return the table of how often each method is above each other."""
    rows = []
    for k, name in enumerate(ranks.methods):
        shares = [ranks.above[k, j] if j != k else None for j in range(len(ranks.methods))]
        cells = [
            elements.Cell(elements.UNKNOWN if share is None else f"{share:.0%}", share) for share in shares
        ]
        rows.append(elements.Row(f"{k + 1}. {name}", cells))
    numbers = [str(k + 1) for k in range(len(ranks.methods))]
    caption = "Share of the resamples in which the method of the row is above that of the column"
    return elements.table(caption, ["method", *numbers], rows, heat=True)


def _board(board: Board, fractions: Sequence[Board], sparse: Sequence[Board], pictures: bool) -> str:
    said = f"{len(board.arms)} contestants{_best(board)}"
    parts = [
        f'<section class="board"><details id="{board.slug}"><summary>'
        f"<h2>{escape(text.heading(board))}</h2> "
        f"<small>{escape(said)}</small></summary>"
    ]
    parts += elements.paragraphs([text.about(board)])
    parts += elements.warnings([*board.unlearned, *board.missing])
    parts.append(_comparison(board, "main"))
    parts += elements.small(text.about_published(board))
    if board.of_section("labels"):
        parts.append("<h3>Pretrained with labels: ranked among themselves</h3>")
        parts.append(_comparison(board, "labels"))
    parts.append(_all_scores(board))
    parts += elements.small(board.notes)
    drawn = (
        figures.forest(board), figures.compute(board), figures.data(board), figures.steps(board),
        figures.fractions(fractions), figures.sparse(sparse), figures.froc(board),
    )  # fmt: skip
    shown = [chart for chart in drawn if chart]
    if shown:
        parts.append(f'<div class="charts">{"".join(shown)}</div>')
    if pictures:
        parts.append(figures.pictures(board))
    parts.append("</details></section>")
    return "\n".join(part for part in parts if part)


def _best(board: Board) -> str:
    """Name the best network of a board, and the best row without one where that is above it."""
    if easy := ahead_of_networks(board):
        return f"; no network is above {easy}"
    best = next(iter(board.ranked()), None)
    return f"; best network: {best.title}, {board.table.main} {number(best.interval.value)}" if best else ""


def _comparison(board: Board, section: str) -> str:
    """Return the table of a section, without the columns that are empty in all its rows."""
    arms = board.of_section(section)
    columns = [
        column
        for column in shown_columns()
        if column.key in ("contestant", "notes") or any(column.cell(board, arm) for arm in arms)
    ]
    labels = ", pretrained with labels" if section == "labels" else ""
    caption = f"{text.heading(board)}{labels}: {board.table.main}, higher is better"
    return _table_of(board, caption, columns, arms, section == "main")


def _all_scores(board: Board) -> str:
    """Return the table of every score of the task, folded; its names are in sight."""
    columns = score_columns(board)
    if not columns:
        return ""
    names = ", ".join(column.heading_on(board) for column in columns[1:])
    table = _table_of(board, f"{text.heading(board)}: all scores", columns, board.arms, True)
    return (
        f"<details><summary>All scores: {escape(names)}</summary><p>{escape(text.ABOUT_SCORES)}</p>"
        f"{table}</details>"
    )


def _table_of(
    board: Board, caption: str, columns: Sequence[Column], arms: Sequence[Arm], published: bool
) -> str:
    """Return a table of contestants: the name first, notes below it, and the other columns."""
    by_key = {column.key: column for column in columns}
    others = [column for column in columns if column.key not in ("contestant", "notes")]
    rows = []
    for arm in arms:
        cells = [
            elements.Cell(column.cell(board, arm), column.sort_key(board, arm), column.tone(arm))
            for column in others
        ]
        notes = by_key["notes"].cell(board, arm) if "notes" in by_key else ""
        # Beside the notes alone: a table of all scores repeats neither.
        settings = settings_of(arm) if "notes" in by_key else ""
        rows.append(
            elements.Row(arm.title, cells, notes, f"k-{arm.kind}" + " out" * (not arm.fair), settings)
        )
    for row in text.published_rows(board) if published else ():
        cells = [elements.Cell(*column.published(board, row)) for column in others]
        rows.append(elements.Row(row["name"], cells, kind="k-published"))
    return elements.table(caption, ["contestant", *(column.heading_on(board) for column in others)], rows)


def _refused(refused: Sequence[Refused]) -> str:
    heading = '<section><h2 id="refused">Refused records</h2>'
    if not refused:
        return f"{heading}<p>No record was refused.</p></section>"
    rows = [
        elements.Row(
            record.where,
            [
                elements.Cell(record.who or elements.UNKNOWN, record.who),
                elements.Cell(record.why, record.why, "notes"),
            ],
        )
        for record in refused
    ]
    count = len(refused)
    files_are = f"{count} files or records are" if count > 1 else "One file or record is"
    return (
        f"{heading}<p>{files_are} in no table, because they cannot be compared or cannot be read.</p>"
        f"{elements.table('Refused records, and the reasons', ['file', 'contestant', 'reason'], rows)}"
        "</section>"
    )


def _conditions(conditions: Sequence[tuple[str, str]]) -> str:
    rows = [elements.Row(name, [elements.Cell(value, value)]) for name, value in conditions]
    table = elements.table("Conditions under which the numbers were made", ["", "value"], rows)
    return f'<section><h2 id="conditions">Conditions</h2>{table}</section>'


# Elements -----------------------------------------------------------------------------------------


def _top_warnings(lines: Sequence[str]) -> str:
    """Return the warnings of all tables in a box, of which several lines are folded."""
    if len(lines) < 2:
        return "".join(elements.warnings(lines))
    first = lines[0].removeprefix("WARNING: ")
    head = first if len(first) <= 110 else first[:108].rpartition(" ")[0] + " …"
    inside = "".join(elements.paragraphs(lines))
    return (
        f'<details class="loud"><summary>{len(lines)} warnings: {escape(head)}</summary>{inside}</details>'
    )


def _slug(ranks: Overall) -> str:
    return f"overall-{ranks.protocol}-{ranks.family}"
