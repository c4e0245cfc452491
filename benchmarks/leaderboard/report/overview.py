"""The first screen of a report: the answer in two sentences, and gains of all contestants on all tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from typing import NamedTuple

from ssl3d.api import charts, elements
from ssl3d_benchmarks.leaderboard.report import text
from ssl3d_benchmarks.leaderboard.report.answer import gained, shown, why_untold
from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.columns import gain_text
from ssl3d_benchmarks.leaderboard.report.names import network_title, relation

FULL = 0.1
"""Gain whose cell has the full colour."""
PALE = 0.005
"""Gain below which a cell has no colour."""
FEW_COLUMNS = 3
"""Most columns whose headings are written across; those of more are turned."""
ROWS = 14
"""Rows of the matrix that are in sight; the others are folded."""
FEW_GAINS = 40
"""Most gains of a family that are all drawn; of more, the best and the worst of each table."""

Group = tuple[str, str]


# In two sentences ---------------------------------------------------------------------------------


def in_short(boards: Sequence[Board]) -> list[str]:
    """Say in two sentences whether pretraining pays: of fine-tuned networks, and of frozen ones."""
    tried = [board for board in boards if board.of_kind("pretrained")]
    if not tried:
        return ["There is no pretrained encoder in these records."]
    tuned = [board for board in tried if board.table.task.startswith("finetune")]
    frozen = [board for board in tried if board not in tuned]
    parts = (("Fine-tuned", "trained from scratch", tuned), ("Frozen", "untrained", frozen))
    sentences = [_sentence(*part) for part in parts if part[2]]
    if len(sentences) == 1:
        least = sorted({f"{board.detectable:.3f}" for board in tried if board.detectable}, key=float)
        sentences += [
            f"The smallest gains that the tables could have shown are {least[0]} to {least[-1]}."
            if len(least) > 1
            else f"The smallest gain that could have been shown is {least[0]}."
            if least
            else "How small a gain could have been shown is unknown: there are too few subjects or seeds."
        ]
    return sentences


def _sentence(head: str, reference: str, boards: Sequence[Board]) -> str:
    tested = [
        (board, [arm for arm in _pretrained(board) if not why_untold(board, arm)]) for board in boards
    ]
    known = [(board, arms) for board, arms in tested if arms]
    if not known:
        reasons = dict.fromkeys(why_untold(board, arm) for board in boards for arm in _pretrained(board))
        return f"{head}, nothing can be told on {_any(len(boards))}: {'; '.join(reasons)}."
    won = [(board, arm) for board, arms in known for arm in arms if shown(arm) and _gain(arm) > 0]
    up = {id(board) for board, _ in won}
    down = sum(any(shown(arm) and _gain(arm) < 0 for arm in arms) for _, arms in known)
    untold = len(boards) - len(known)
    more = f"; nothing can be told on {untold} more" if untold else ""
    apart = _with_labels(boards)
    same, tables = f"the same network {reference}", _tables(len(known))
    if not won:
        worse = f", and one is significantly worse on {down}" if down else ""
        where = _any(len(known))
        return f"{head}, no pretrained encoder is shown better than {same} on {where}{worse}{more}.{apart}"
    board, arm = max(won, key=lambda pair: _gain(pair[1]))
    worse = f" and significantly worse on {down}" if down else ""
    return (
        f"{head}, a pretrained encoder is significantly better than {same} on {len(up)} of {tables}{worse}"
        f"{more}; the largest gain is {gained(arm)} {board.table.main} ({text.heading(board)}).{apart}"
    )


def _with_labels(boards: Sequence[Board]) -> str:
    """Say where a network that was pretrained with labels is better, which the answer does not count."""
    won = [
        (board, arm)
        for board in boards
        for arm in board.of_kind("pretrained", "imagenet")
        if (arm.kind == "imagenet" or arm.section == "labels") and not why_untold(board, arm)
        if shown(arm) and _gain(arm) > 0
    ]
    if not won:
        return ""
    board, arm = max(won, key=lambda pair: _gain(pair[1]))
    tables = _tables(len({id(board) for board, _ in won}))
    return (
        f" A network pretrained with labels, as on ImageNet, is better on {tables}; the largest gain is "
        f"{gained(arm)} {board.table.main} ({text.heading(board)})."
    )


def _any(count: int) -> str:
    return f"any of {_tables(count)}" if count > 1 else "the only table"


def _tables(count: int) -> str:
    return f"{count} table{'s' * (count != 1)}"


def _pretrained(board: Board) -> list[Arm]:
    return [arm for arm in board.of_kind("pretrained") if arm.section == "main"]


def _gain(arm: Arm) -> float:
    return arm.gain.value if arm.gain else float("nan")


# Matrix -------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """What the cells of a row have in common: the method, what it was trained on, and the network."""

    method: str
    network: str


def matrix(boards: Sequence[Board]) -> str:
    """Return the table of gains: contestants down, tables across, each cell a link to its table."""
    columns = [board for board in boards if board.of_kind("pretrained", "imagenet")]
    rows: dict[_Name, dict[int, Arm]] = {}
    for number, board in enumerate(columns):
        # Norms taken anew stand in the tables; of both rows the matrix has that of the encoder as it is.
        arms = sorted(board.of_kind("pretrained", "imagenet"), key=lambda arm: arm.first.recalibrated)
        alike = Counter((_name(arm, board), arm.first.recalibrated) for arm in arms)
        for arm in arms:
            name = _name(arm, board)
            if alike[name, arm.first.recalibrated] > 1:  # none of several may stand for all
                name = name._replace(method=arm.title)
            rows.setdefault(name, {}).setdefault(number, arm)
    if not rows:
        return ""
    order = sorted(rows, key=lambda name: (-_won(rows[name]), -len(rows[name]), name))
    groups: dict[Group, int] = {}
    for board in columns:
        groups[_group(board)] = groups.get(_group(board), 0) + 1
    head = '<tr><th scope="col" rowspan="2">contestant</th>' + "".join(
        f'<th scope="colgroup" colspan="{count}" class="g{" t" * (count < 3)}">'
        f"<span>{escape(_group_words(group))}</span></th>"
        for group, count in groups.items()
    )
    head += "</tr><tr>" + "".join(
        f'<th scope="col" class="t"><a href="#{board.slug}" '
        f'title="{escape(text.heading(board), quote=True)}">'
        f"<span>{escape(_column(board, columns))}</span></a></th>"
        for board in columns
    )
    networks = {name.network for name in rows if name.network}
    several = len(networks) > 1  # one network is said once, not in every row
    body = "".join(
        f'<tr{" class=more" * (k >= ROWS)}><th scope="row">{escape(name.method)}'
        f"{f'<small>{escape(name.network)}</small>' * several}</th>"
        f"{''.join(_cell(board, rows[name].get(n)) for n, board in enumerate(columns))}</tr>"
        for k, name in enumerate(order)
    )
    legend = (f"Network: {escape(next(iter(networks), ''))}. " * (len(networks) == 1)) + (
        'Gain over the same network untrained or from scratch: <i class="up3"></i> better, '
        f'<i class="down3"></i> worse, no colour below ±{PALE:g}, full colour from ±{FULL:g} on; '
        '<b class="star">●</b> significant after Holm\'s correction: without it, a gain may be chance; '
        '<i class="untold"></i> nothing can be told.'
    )
    caption = "Gains of every contestant on every table; a cell leads to its table"
    return (
        f'<p class="legend"><small>{legend}</small></p>'
        f'<div class="wide matrix" tabindex="0" role="region" aria-label="{caption}">'
        f'<table{" class=few" * (len(columns) <= FEW_COLUMNS)} style="--columns:{len(columns)}">'
        '<colgroup class="name"></colgroup>'
        f'<colgroup span="{len(columns)}"></colgroup>'
        f"<caption>{caption}</caption><thead>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _name(arm: Arm, board: Board) -> _Name:
    method = arm.title.split(", ")[0]
    if arm.kind != "pretrained":
        return _Name(method, "")
    words = [method, relation(arm, board.table)]
    return _Name(", ".join(word for word in words if word), network_title(arm))


def _won(arms: Mapping[int, Arm]) -> int:
    return sum(shown(arm) * (1 if _gain(arm) > 0 else -1) for arm in arms.values())


def _group(board: Board) -> Group:
    return board.table.protocol, board.table.family


def _group_words(group: Group) -> str:
    protocol, family = group
    return f"{family} ({'fine-tuned' if protocol.startswith('finetune') else protocol})"


def _column(board: Board, boards: Sequence[Board]) -> str:
    """Name a table in the heading of a column: its data, and the labels where they are few."""
    data = ", ".join(board.table.dataset)
    train = board.arms[0].first.result.split.get("train", {})
    few = f", {train.get('subjects')} subjects" if board.fraction < 1 else ""
    slices = f", {board.table.slices} slice{'s' * (board.table.slices > 1)}" if board.table.slices else ""
    target = f", {board.table.target}" if board.table.target in ("ordinal", "real") else ""
    words = f"{data}{target}{few}{slices}"
    number = f" ({board.table.number})" if board.table.number and board in boards else ""
    return words + number


def _cell(board: Board, arm: Arm | None) -> str:
    if arm is None:
        return "<td></td>"
    why = why_untold(board, arm)
    hint = f"{arm.title} on {text.heading(board)}: {gain_text(arm.gain)} {why or board.table.main}".strip()
    look, words, mark = "untold", "", ""
    if arm.gain and isfinite(arm.gain.value):
        words = f"{arm.gain.value:+.3f}".replace("0.", ".").replace("-", "−")
        words = "0" if words[1:] == ".000" else words
    if not why:
        steps = min(3, 1 + int(2.999 * min(abs(_gain(arm)) / FULL, 1.0)))
        look = f"{'up' if _gain(arm) >= 0 else 'down'}{steps}" if abs(_gain(arm)) >= PALE else "even"
        mark = '<b class="star">●</b>' if shown(arm) else ""
    inside = f'<a href="#{board.slug}">{words}{mark}</a>'
    return f'<td class="{look}" title="{escape(hint, quote=True)}">{inside}</td>'


# Forest of gains ----------------------------------------------------------------------------------


def gains(boards: Sequence[Board]) -> str:
    """Draw the gains with their intervals, a figure for each family of tables."""
    groups: dict[tuple[Group, str], list[Board]] = {}
    for board in boards:
        if any(arm.gain and isfinite(arm.gain.low) for arm in board.arms):
            groups.setdefault((_group(board), board.table.main), []).append(board)
    drawn = [_forest(group, main, members) for (group, main), members in groups.items()]
    return f'<div class="gains">{"".join(drawn)}</div>' if drawn else ""


def _forest(group: Group, main: str, boards: Sequence[Board]) -> str:
    rows = [(board, _tested(board)) for board in boards]
    rows = [(board, arms) for board, arms in rows if arms]
    if not rows:
        return ""
    every = sum(len(arms) for _, arms in rows)
    some = every > FEW_GAINS
    marks: list[charts.Mark] = []
    for board, arms in rows:
        marks.append(charts.Mark(_column(board, boards), float("nan"), kind="heading"))
        kept = [arms[0], arms[-1]] if some and len(arms) > 2 else arms
        marks += [
            charts.Mark(arm.title, _gain(arm), *_ends(arm), arm.kind, faint=not shown(arm)) for arm in kept
        ]
    words = _group_words(group)
    title = f"Gains with 95 % intervals: {words}"
    caption = (
        f"{words.capitalize()}: gain in {main} over the same network untrained or from scratch, with its "
        "95 % interval. Names in full colour are significant after Holm's correction."
    )
    if some:
        caption += (
            f" Of {every} gains the largest and the smallest of each table are drawn: the best of many is "
            "partly luck."
        )
    return elements.figure(charts.forest(marks, f"gain in {main}", 0.0, title), caption)


def _tested(board: Board) -> list[Arm]:
    arms = [arm for arm in board.of_kind("pretrained", "imagenet") if not why_untold(board, arm)]
    return sorted(arms, key=lambda arm: -_gain(arm))


def _ends(arm: Arm) -> tuple[float, float]:
    assert arm.gain is not None
    return arm.gain.low, arm.gain.high
