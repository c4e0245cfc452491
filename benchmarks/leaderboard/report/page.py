"""A leaderboard as one HTML page: nothing is loaded, it works without scripts, on a phone, in the dark."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from ssl3d.api import unpacked_place
from ssl3d_benchmarks.leaderboard.report import charts as charts
from ssl3d_benchmarks.leaderboard.report import text as text
from ssl3d_benchmarks.leaderboard.report.answer import answer
from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.charts import Line, Mark
from ssl3d_benchmarks.leaderboard.report.overall import Overall, no_overall
from ssl3d_benchmarks.leaderboard.report.records import Refused
from ssl3d_benchmarks.leaderboard.report.statistics import curve_of

PICTURE_WIDTH = 900
NAN = float("nan")
Row = tuple[str, str | tuple[str, str], Sequence[Any]]
"""Of a table: its class, its name (and what stands below it), and per cell what is shown and its key."""

STYLE = (
    """
:root{--bg:#fcfcfb;--fg:#1d1d1b;--dim:#6d6b66;--line:#dedbd4;--soft:#f2f0eb;--accent:#0b62a8;
--warn:#a63a00;
--good:#1a7a3c;--c0:#0b62a8;--c1:#c2500a;--c2:#16803c;--c3:#b3206b;--c4:#6a4fc4;--c5:#8a6a00;
--c6:#0f7f83;--c7:#8f3b2a}
@media(prefers-color-scheme:dark){:root{--bg:#171716;--fg:#e9e7e2;--dim:#a09d96;--line:#3a3936;
--soft:#222120;
--accent:#6db4f2;--warn:#ff9d66;--good:#6fcf8e;--c0:#6db4f2;--c1:#ff9d5c;--c2:#74cf8f;--c3:#f28bc0;
--c4:#b09ef5;
--c5:#dcbf55;--c6:#5fcdd0;--c7:#e2937f}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1180px;padding:1rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.6rem 0}h2{font-size:1.25rem;margin:2.4rem 0 .5rem;
line-height:1.3}
h3{font-size:1.02rem;margin:1.4rem 0 .3rem}p{margin:.5rem 0;max-width:75ch}a{color:var(--accent)}
small,.dim{color:var(--dim)}ul{padding-left:1.2rem;max-width:80ch}nav ul{columns:2 20rem;
list-style:none;padding:0}
.answer{border-left:4px solid var(--accent);background:var(--soft);padding:.6rem 1rem;font-size:1.05rem}
.answer p{margin:.35rem 0}.loud{border:2px solid var(--warn);color:var(--warn);padding:.4rem .8rem;
margin:.6rem 0;font-weight:600;border-radius:4px;max-width:80ch}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:.6rem 0;max-height:80vh}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.88rem;
font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.4rem .6rem;color:var(--dim);font-size:.85rem}
th,td{padding:.32rem .6rem;text-align:left;border-top:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}thead th{position:sticky;top:0;background:var(--soft);
border-top:0;white-space:nowrap;z-index:2}
tbody th{overflow-wrap:anywhere;position:sticky;left:0;background:var(--bg);
font-weight:600;
min-width:9.5rem;max-width:20rem;z-index:1}
@media(min-width:900px){tbody th{min-width:14rem}}td.notes{min-width:12rem}
tbody th small{display:block;font-weight:400;font-style:normal;line-height:1.3}
tr.out th small{color:inherit}
@media(max-width:600px){tbody th{min-width:7rem;max-width:8.5rem}th,td{padding:.28rem .4rem}
table{font-size:.82rem}}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--accent)}
th button::after{content:" \\2195";color:var(--dim)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
tr.k-scratch>*,tr.k-trivial>*,tr.k-published>*{color:var(--dim)}tr.k-published>*{font-style:italic}
tr.out>*{color:var(--warn)}.up{color:var(--good);font-weight:600}.down{color:var(--warn);
font-weight:600}
figure{margin:.8rem 0;min-width:0}figcaption{font-size:.88rem;color:var(--dim);max-width:75ch}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:1.2rem;
align-items:start}
.chart{overflow-x:auto}.chart svg{display:block;width:100%;height:auto}
figure img{max-width:100%;height:auto;background:#fff;border-radius:4px}
svg text{font-size:12px;fill:var(--fg)}svg text.axis,svg text.dim{fill:var(--dim)}
svg .grid{stroke:var(--line)}
svg .ref{stroke:var(--dim);stroke-dasharray:4 4}svg .bar{stroke:var(--fg);stroke-width:1.6}
svg .bar.thin{stroke-width:1.2;opacity:.45}svg .mark{fill:var(--c0);stroke:var(--bg);stroke-width:1}
svg .k-imagenet{fill:var(--c1)}svg .bar.k-pretrained{stroke:var(--c0)}
svg .bar.k-imagenet{stroke:var(--c1)}
svg .bar.k-scratch,svg .bar.k-trivial{stroke:var(--dim)}
svg .hollow{fill:var(--bg);stroke:var(--dim);stroke-width:1.8}svg .cross{fill:none;stroke:var(--dim);
stroke-width:2}
svg .faint{opacity:.5}svg .curve{fill:none;stroke-width:1.8}svg .lead{fill:none;opacity:.4}
svg .axisline{stroke:var(--fg)}svg .stem{fill:none;stroke:var(--dim)}svg .clique{stroke:var(--accent);
stroke-width:4}
svg .dash{stroke-dasharray:5 3}
details{margin:.6rem 0}summary{cursor:pointer}td.heat{text-align:right}
@media print{.wide{max-height:none;overflow:visible}}
"""
    + "".join(
        f"svg .c{k}{{stroke:var(--c{k})}}svg "
        f".mark.c{k}{{fill:var(--c{k});stroke:var(--bg);stroke-dasharray:none}}"
        f"svg text.c{k}{{fill:var(--c{k});stroke:none}}"
        for k in range(charts.COLOURS)
    )
    + (
        "svg .c-plain{stroke:var(--dim)}svg text.c-plain{fill:var(--dim);stroke:none}"
        "svg .mark.c-plain{fill:var(--bg);stroke:var(--dim);stroke-dasharray:none}"
    )
)

SCRIPT = """
document.querySelectorAll('table.sort').forEach(function(t){
t.querySelectorAll('thead th').forEach(function(h,k){
var b=document.createElement('button');b.type='button';
b.textContent=h.textContent;h.textContent='';h.appendChild(b);
b.addEventListener('click',function(){var up=h.getAttribute('aria-sort')!=='ascending';
t.querySelectorAll('thead th').forEach(function(o){o.removeAttribute('aria-sort')});
h.setAttribute('aria-sort',up?'ascending':'descending');var body=t.tBodies[0];
Array.from(body.rows).sort(function(a,b){var x=a.cells[k].dataset.v,y=b.cells[k].dataset.v;
if(x===''||y==='')return (x==='')-(y==='');var n=Number(x)-Number(y);
if(isNaN(n))n=x.localeCompare(y,undefined,{numeric:true});return up?n:-n})
.forEach(function(r){body.appendChild(r)})})})});
"""


def page(
    title: str, boards: Sequence[Board], overall: Sequence[Overall], refused: Sequence[Refused],
    conditions: Sequence[tuple[str, str]], pictures: bool = True,
) -> str:  # fmt: skip
    """The page.

    Args:
        title: Of the page.
        boards: Tables.
        overall: Ranks over tasks.
        refused: Rows in no table.
        conditions: Names and values of what the numbers were made with.
        pictures: Whether the PNGs beside the records are shown.
    """
    parts = [f"<h1>{escape(title)}</h1>", '<section class="answer" aria-label="Answer">']
    parts.append("<p><strong>Does pretraining pay on these data?</strong></p>")
    parts += [f"<p>{escape(line)}</p>" for line in answer(boards)]
    parts.append("</section>")
    parts += [f'<p class="loud" role="note">{escape(line)}</p>' for line in _loud(boards)]
    parts.append(_how_to_read())
    parts.append("<nav aria-label='Contents'><ul>")
    for one in overall:
        parts.append(
            f'<li><a href="#{_slug(one)}">Overall: {escape(one.family)} ({escape(one.protocol)})</a></li>'
        )
    for board in boards:
        parts.append(f'<li><a href="#{board.slug}">{escape(text.heading(board))}</a></li>')
    parts.append(
        '<li><a href="#refused">Refused rows</a></li><li><a '
        'href="#conditions">Conditions</a></li></ul></nav>'
    )
    parts += [_overall(one) for one in overall]
    parts += [f"<p><small>{escape(line)}</small></p>" for line in no_overall(boards)]
    for board in boards:
        same = [one for one in boards if one.table is board.table]
        sparse = [
            one
            for one in boards
            if one.fraction == board.fraction and one.table.but_for_slices == board.table.but_for_slices
        ]
        sparse.sort(key=lambda one: one.table.slices or float("inf"))
        few = same if board is same[0] else [board]
        parts.append(_board(board, few, sparse if board is sparse[-1] else [], pictures))
    parts.append(_refused(refused))
    parts.append(_conditions(conditions))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _loud(boards: Sequence[Board]) -> list[str]:
    """Leaks, and baselines that lack everywhere, at the top."""
    lines = []
    leaked = sorted(
        {arm.label for board in boards for arm in board.arms if "pretraining saw" in arm.why_unranked}
    )
    if leaked:
        lines.append(
            f"Leak: pretraining of {', '.join(leaked)} saw test subjects. They are shown, and not ranked."
        )
    if boards and not any(board.of_kind("imagenet") for board in boards):
        lines.append(
            "No ImageNet conversion is among these records: nothing is said of ImageNet against "
            "pretraining."
        )
    unequal = [
        text.heading(board) for board in boards if any("tuning is unequal" in x for x in board.missing)
    ]
    if unequal:
        lines.append(f"Unequal tuning: {'; '.join(unequal)}. A gain there can be one of tuning.")
    bare = [text.heading(board) for board in boards if not board.of_kind("scratch")]
    if bare:
        lines.append(
            f"No untrained or from-scratch row: {'; '.join(bare)}. Nothing there can be called a gain."
        )
    return lines


def _how_to_read() -> str:
    return (
        "<details><summary>How the numbers are made</summary><ul>"
        "<li>Scores: mean over seeds and subsets, with a 95 % interval over test subjects (bootstrap, "
        "corrected for "
        "bias and skew), seeds and subsets, widened by Student's t for few of them. With fewer than "
        "about twenty "
        "subjects, a rare failure that is not among them cannot be in the interval.</li>"
        "<li>Differences are paired: same resamples of the same subjects. The reference is the same "
        "network untrained "
        "(probes) or trained from scratch (fine-tuning), of both treatments of its norms the better "
        "one. p by Student's t "
        "on that error, so p &lt; .05 just where the uncorrected interval spares 0; Holm's correction "
        "over all tests of "
        "the table. The best ImageNet conversion is chosen by its score on the same test subjects.</li>"
        "<li>The smallest detectable difference is t[.975] + t[.8] standard errors (alpha .05, power .8) "
        "at the degrees of freedom of the difference; below three of them there is none.</li>"
        "<li>Rank (a–b): 95 % of the ranks over resamples of subjects and seeds. Rows without a "
        "network, published "
        "numbers, and encoders whose pretraining saw test subjects have no rank; encoders pretrained "
        "with labels are "
        "ranked among themselves.</li>"
        "<li>Symbols: filled circle pretrained, square ImageNet, diamond untrained or from scratch, "
        "triangle no network, "
        "cross published; the dashed line is the untrained or from-scratch row.</li></ul></details>"
    )


# Sections -----------------------------------------------------------------------------------------


def _overall(one: Overall) -> str:
    parts = [f'<section><h2 id="{_slug(one)}">{one.family.capitalize()} over {len(one.boards)} tasks '
             f"({escape(one.protocol)})</h2>"]  # fmt: skip
    tasks = [board.table.title.partition(":")[0] for board in one.boards]
    if len(set(tasks)) < len(tasks):
        tasks = [board.table.title for board in one.boards]
    rows = []
    for k, name in enumerate(one.methods):
        low, high = one.intervals[k]
        each = [(f"{rank:g}", rank) for rank in one.ranks[k]]
        cells = [(f"{one.average[k]:.2f} [{low:.2f}, {high:.2f}]", one.average[k]),
                 (f"{one.first_share[k]:.0%}", one.first_share[k]), *each]  # fmt: skip
        rows.append(("", name, cells))
    parts.append(_table(
        "Average rank over tasks, 1 is best; the interval resamples subjects and seeds within tasks",
        ["method", "average rank [95 %]", "first in", *tasks], rows,
    ))  # fmt: skip
    parts.append(f"<p>{escape(text.stability(one))}</p>")
    parts.append(f"<p><small>{escape(text.OVER_TASKS)}</small></p>")
    if one.left_out or one.tasks_left_out:
        tasks_gone = len(one.tasks_left_out)
        gone = f"{tasks_gone} task{'s' * (tasks_gone > 1)} left out; " if tasks_gone else ""
        parts.append(f"<details{' open' * bool(gone)}><summary>{gone}{len(one.left_out)} contestants are "
                     f"not on every task</summary><p>{escape(text.left_out(one))}</p>"
                     "</details>")  # fmt: skip
    if one.critical is not None:
        picture = charts.critical(
            one.methods, list(one.average), one.critical.difference, one.critical.cliques,
            "Critical-difference picture: " + text.stability(one),
        )  # fmt: skip
        parts.append(
            _figure(picture, "Average ranks; a bar joins what Nemenyi's test cannot tell apart at .05.")
        )
    matrix = []
    for k, name in enumerate(one.methods):
        cells = []
        for j in range(len(one.methods)):
            share = one.above[k, j]
            cells.append(("–" if j == k else f"{share:.0%}", share if j != k else None))
        matrix.append(("", name, cells))
    if len(one.methods) <= 20:
        names = [str(k + 1) for k in range(len(one.methods))]
        numbered = [(kind, f"{k + 1}. {name}", cells) for k, (kind, name, cells) in enumerate(matrix)]
        parts.append("<details><summary>How often each is above each other</summary>")
        parts.append(_table("Share of the resamples in which the row is above the column",
                            ["method", *names], numbered, heat=True))  # fmt: skip
        parts.append("</details>")
    parts.append("</section>")
    return "\n".join(parts)


def _board(board: Board, fractions: Sequence[Board], sparse: Sequence[Board], pictures: bool) -> str:
    parts = [f'<section><h2 id="{board.slug}">{escape(text.heading(board))}</h2>']
    parts.append(f"<p>{escape(text.told(board))}</p>")
    parts += [
        f'<p class="loud" role="note">{escape(line)}</p>' for line in [*board.unlearned, *board.missing]
    ]
    parts.append(_scores(board, "main"))
    parts += [f"<p><small>{escape(note)}</small></p>" for note in text.about_published(board)]
    if board.of_section("labels"):
        parts.append("<h3>Pretrained with labels: ranked among themselves</h3>")
        parts.append(_scores(board, "labels"))
    parts += [f"<p><small>{escape(note)}</small></p>" for note in board.notes]
    drawn = (_forest(board), _compute(board), _data(board), _steps(board), _fractions(fractions),
             _sparse(sparse), _froc(board))  # fmt: skip
    shown = [chart for chart in drawn if chart]
    if shown:
        parts.append(f'<div class="charts">{"".join(shown)}</div>')
    if pictures:
        parts.append(_pictures(board))
    parts.append("</section>")
    return "\n".join(part for part in parts if part)


def _scores(board: Board, section: str) -> str:
    """The table of a section; what is to be known of a row stands below its name, always in sight."""
    arms = board.of_section(section)
    head = text.headers(board)
    notes = len(head) - 1
    # The smallest difference that can be shown stands above the table, for each row it is in the CSV.
    apart = (1, head.index("smallest detectable"), notes)
    keep = [
        k for k in range(len(head)) if k not in apart and any(text.cells(board, arm)[k] for arm in arms)
    ]
    rows: list[Row] = []
    for arm in arms:
        cells, keys = text.cells(board, arm), _keys(arm)
        kind = f"k-{arm.kind}" + (" out" if arm.why_unranked not in ("", "no network") else "")
        rows.append((kind, (cells[1], cells[notes]), [(cells[k], keys[k], _tone(arm, k)) for k in keep]))
    for row in text.published(board) if section == "main" else ():
        value = next(one for one in board.table.published if one["name"] == row[1])[board.table.main]
        rows.append(("k-published", row[1], [(row[k], value if k == 2 else None, "") for k in keep]))
    about = ", pretrained with labels" if section == "labels" else ""
    caption = f"{text.heading(board)}{about}: {board.table.main}, higher is better"
    return _table(caption, ["contestant", *[head[k] for k in keep]], rows)


def _keys(arm: Arm) -> list[Any]:
    gain, over = arm.gain, arm.over_imagenet
    return [
        arm.rank, None, arm.interval.value, gain and gain.value, arm.p_holm, over and over.value,
        arm.p_imagenet_holm, gain and gain.error, arm.first.flops(), text.seconds_of(arm),
        text.memory_of(arm), None,
    ]  # fmt: skip


def _tone(arm: Arm, column: int) -> str:
    for at, difference, p in ((3, arm.gain, arm.p_holm), (5, arm.over_imagenet, arm.p_imagenet_holm)):
        if column == at and difference and p is not None and p < 0.05:
            return "up" if difference.value > 0 else "down"
    return ""


def _forest(board: Board) -> str:
    marks = [
        Mark(arm.label, arm.interval.value, arm.interval.low, arm.interval.high, arm.kind,
             arm.rank is None and arm.kind not in ("trivial",))
        for arm in board.arms
    ]  # fmt: skip
    if board.fraction == 1:
        marks += [Mark(f"{one['name']} (published)", one[board.table.main], kind="published", faint=True)
                  for one in board.table.published]  # fmt: skip
    marks.sort(key=lambda mark: -mark.value if isfinite(mark.value) else float("inf"))
    title = f"{board.table.main} of {len(marks)} contestants with 95 % intervals: {text.heading(board)}"
    return _figure(charts.forest(marks, board.table.main, _reference(board), title),
                   "Scores with 95 % intervals; differences are paired, so overlapping intervals can "
                   "still differ: "
                   "see the table.")  # fmt: skip


def _fair(arm: Arm) -> bool:
    """Whether it may be drawn beside others: not where pretraining saw test subjects."""
    return arm.why_unranked in ("", "no network")


def _reference(board: Board) -> float | None:
    found = [arm.interval.value for arm in board.of_kind("scratch")]
    return max(found) if found else None


def _compute(board: Board) -> str:
    """Score against compute: with encoders on the way, a curve for each; else points."""
    curves = []
    for arm in board.of_kind("pretrained"):
        flops = arm.first.flops()
        if not flops or not _fair(arm):
            continue
        own = [(flops, arm.interval.value, arm.interval.low, arm.interval.high)]
        way = [
            (one.first.flops() or 0.0, one.interval.value, NAN, NAN)
            for one in board.on_the_way
            if one.first.stem == arm.first.stem
            and one.first.recalibrated == arm.first.recalibrated
            and one.first.proxies == arm.first.proxies
            and one.first.recipe == arm.first.recipe
        ]
        reference = _reference(board)
        if way and reference is not None and min(x for x, *_ in way) > 0:
            way.append((0.0, reference, NAN, NAN))
        curves.append(Line(arm.label, sorted(way + own), arm.kind))
    if not curves:
        return ""
    several = any(len(one.points) > 1 for one in curves)
    if several:
        curves = [Line(one.label, [(x, v, NAN, NAN) for x, v, _, _ in one.points]) for one in curves]
    amounts = {point[0] for one in curves for point in one.points}
    if len(amounts) < 2 or (max(amounts) < 1.3 * max(min(amounts), 1e-9) and not several):
        return ""
    words = "Score against the FLOPs of pretraining."
    if several:
        words = (
            "Score while pretraining goes on, at 0, 25, 50 and 100 % of the budget; 0 is the untrained "
            "row. A flat curve means undertrained or broken."
        )
    title = "Score against compute: " + text.heading(board)
    picture = charts.lines(
        curves, "training FLOPs of pretraining", board.table.main, title, not several, _reference(board)
    )
    return _figure(picture, words)


def _data(board: Board) -> str:
    """Score against the amount and variety of pretraining data."""
    points = []
    for arm in board.of_kind("pretrained"):
        data = arm.first.pretraining.get("data") or {}
        if data.get("volumes") and _fair(arm):
            sets = list(data.get("datasets") or ())
            mark = Mark(f"{arm.label} ({len(sets)} data set{'s' * (len(sets) != 1)})",
                        arm.interval.value, arm.interval.low, arm.interval.high, arm.kind)  # fmt: skip
            points.append((float(data["volumes"]), mark))
    amounts = [x for x, _ in points]
    if not amounts or max(amounts) < 1.5 * min(amounts):
        return ""
    title = "Score against pretraining data: " + text.heading(board)
    picture = charts.scatter(points, "volumes in pretraining", board.table.main, title, _reference(board))
    return _figure(
        picture,
        "Score against the amount of pretraining data; in brackets, how many data sets they are of.",
    )


def _steps(board: Board) -> str:
    curves = []
    for arm in board.arms:
        steps, values, _ = curve_of(arm)
        if len(steps) > 1 and _fair(arm):
            points = [(float(s), v, NAN, NAN) for s, v in zip(steps, values, strict=True)]
            curves.append(Line(arm.label, points, arm.kind))
    picture = charts.lines(curves, "fine-tuning steps", f"{board.table.main} on validation subjects",
                           "Score against fine-tuning steps: " + text.heading(board))  # fmt: skip
    return _figure(
        picture,
        "Does pretraining converge sooner? Validation score while fine-tuning goes on, mean over seeds.",
    )


def _fractions(boards: Sequence[Board]) -> str:
    if len(boards) < 2:
        return ""
    points: dict[str, tuple[str, list[tuple[float, float, float, float]]]] = {}
    for board in boards:
        people = board.arms[0].first.result.split.get("train", {}).get("subjects")
        for arm in board.arms:
            if _fair(arm) and people:
                own = points.setdefault(arm.label, (arm.kind, []))[1]
                own.append((float(people), arm.interval.value, arm.interval.low, arm.interval.high))
    curves = [Line(label, sorted(own), kind) for label, (kind, own) in points.items() if len(own) > 1]
    title = "Score against the number of labelled subjects: " + boards[0].table.title
    picture = charts.lines(curves, "training subjects with labels", boards[0].table.main, title, log=True)
    return _figure(
        picture,
        "Few labels and many: nested subsets of the training subjects, the same for every contestant.",
    )


def _froc(board: Board) -> str:
    """Sensitivity against false positives per scan, where the records have it."""
    curves = []
    for arm in board.arms:
        rates = [name for name in arm.first.result.scores if re.fullmatch(r"froc_[\d.]+", name)]
        if rates and _fair(arm):
            points = [
                (float(name[5:]), fmean(one.result.scores[name] for one in arm.records()), NAN, NAN)
                for name in rates
            ]
            curves.append(Line(arm.label, sorted(points), arm.kind))
    title = "FROC: " + text.heading(board)
    picture = charts.lines(curves, "false positives per scan", "sensitivity", title, log=True)
    return _figure(picture, "FROC: what share of the objects is found, at how many false alarms a scan.")


def _sparse(boards: Sequence[Board]) -> str:
    """Score against annotated slices; `boards` from few to many, all of them (0) last."""
    if len(boards) < 2:
        return ""
    points: dict[str, tuple[str, list[tuple[float, float, float, float]]]] = {}
    for board in boards:
        # All slices, at the next power of two: there is no one number of them.
        most = max(one.table.slices for one in boards)
        count = float(board.table.slices or 2 * most)
        for arm in board.arms:
            if _fair(arm):
                own = points.setdefault(arm.label, (arm.kind, []))[1]
                own.append((count, arm.interval.value, arm.interval.low, arm.interval.high))
    curves = [Line(label, own, kind) for label, (kind, own) in points.items() if len(own) > 1]
    whole = boards[-1].table.slices == 0
    axis = "annotated slices of each training volume"
    title = "Score against annotated slices: " + boards[-1].table.title
    called = {2.0 * max(one.table.slices for one in boards): "all"} if whole else {}
    picture = charts.lines(curves, axis, boards[-1].table.main, title, log=True, called=called)
    return _figure(
        picture, "Sparse annotation: the loss is taken on these slices alone, the score on all of them."
    )


def _pictures(board: Board) -> str:
    """Predictions beside the truth, or an embedding map: of the best, and of the reference."""
    ranked = [arm for arm in board.ranked() if arm.kind in ("pretrained", "imagenet")]
    parts = []
    for arm in [*ranked[:1], *board.of_kind("scratch")[:1]]:
        path = next((found for one in arm.records() for found in _beside(one.path, one.result.key)), None)
        shown = _inline(path) if path is not None else None
        if path is not None and shown:
            what = "embeddings of the test part on their principal axes" if "embeddings" in path.name else (
                "predictions beside the truth")  # fmt: skip
            parts.append(
                f'<figure><img loading="lazy" alt="{escape(arm.label, quote=True)}: {what}" src="{shown}">'
                f"<figcaption>{escape(arm.label)}: {what}.</figcaption></figure>"
            )
    return (
        f'<details open><summary>Pictures</summary><div class="charts">{"".join(parts)}</div></details>'
        if parts
        else ""
    )


def _beside(path: Path, key: str) -> list[Path]:
    return sorted(unpacked_place(path).parent.glob(f"*{key[:8]}*.png"))


def _inline(path: Path) -> str | None:
    """A picture, down-sized, as a data URI; None where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    if small.width > PICTURE_WIDTH:
        height = max(1, round(small.height * PICTURE_WIDTH / small.width))
        small = small.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _refused(refused: Sequence[Refused]) -> str:
    if not refused:
        return '<section><h2 id="refused">Refused rows</h2><p>No record was refused.</p></section>'
    rows: list[Row] = [("", one.where, [(one.who or "–", one.who), (one.why, one.why)]) for one in refused]
    return (
        f'<section><h2 id="refused">Refused rows</h2><p>{len(refused)} files or rows are in no table, '
        f"because they "
        "cannot be compared or cannot be read.</p>"
        + _table("What was refused, and why", ["file", "contestant", "why"], rows)
        + "</section>"
    )


def _conditions(conditions: Sequence[tuple[str, str]]) -> str:
    rows: list[Row] = [("", name, [(value, value)]) for name, value in conditions]
    return '<section><h2 id="conditions">Conditions</h2>' + _table(
        "What the numbers were made with", ["", "value"], rows) + "</section>"  # fmt: skip


# --------------------------------------------------------------------------------------------------


def _table(caption: str, head: Sequence[str], rows: Sequence[Row], heat: bool = False) -> str:
    """A table that a script can sort: every cell has its key, a number or text; without one it is last."""
    columns = "".join(f'<th scope="col">{escape(name.strip())}</th>' for name in head)
    body = []
    for kind, name, cells in rows:
        name, about = (name, "") if isinstance(name, str) else name
        below = f"<small>{escape(about)}</small>" if about else ""
        row = [f'<th scope="row" data-v="{escape(name, quote=True)}">{escape(name)}{below}</th>']
        for cell in cells:
            shown, key, *rest = cell
            tone = rest[0] if rest else ""
            key_text = "" if key is None or (isinstance(key, float) and not isfinite(key)) else str(key)
            number = isinstance(key, (int, float)) or shown in ("-", "–")
            look = ["n"] if number else ["notes"] if head[len(row)] == "why" else []
            style = ""
            if heat and key is not None:
                look = ["heat"]
                share = int(60 * float(key))
                style = f' style="background:color-mix(in srgb,var(--accent) {share}%,transparent)"'
            look += [tone] if tone else []
            classes = f' class="{" ".join(look)}"' if look else ""
            row.append(f'<td{classes}{style} data-v="{escape(key_text, quote=True)}">{escape(shown)}</td>')
        of_row = f' class="{kind}"' if kind else ""
        body.append(f"<tr{of_row}>{''.join(row)}</tr>")
    return (
        f'<div class="wide" tabindex="0" role="region" '
        f'aria-label="{escape(caption, quote=True)}"><table class="sort">'
        f"<caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>" if picture else ""


def _slug(one: Overall) -> str:
    return f"overall-{one.protocol}-{one.family}"
