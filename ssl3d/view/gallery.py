"""Cards of volumes that a page shows some at a time, with search, filters and an order to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from ssl3d.amounts import printable

SIDES = ((60, 190), (400, 140), (10**9, 96))
"""Pixels of a volume's longest side, for galleries of up to so many volumes."""
MOST_KINDS = 60
"""Most values of a filter."""


@dataclass(frozen=True)
class Card:
    """What the page shows of one volume.

    Attributes:
        name: Name of the volume.
        picture: Picture as HTML; empty where there is none.
        lines: Lines below the picture, as text.
        filters: Values that a filter may ask for, by the name of the filter.
        orders: Numbers to order by, by the name of the order; None for what is last.
        fault: Why the volume cannot be shown; empty where it can.
        extra: HTML below the lines.
    """

    name: str
    picture: str
    lines: Sequence[str] = ()
    filters: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, float | None] = field(default_factory=dict)
    fault: str = ""
    extra: str = ""


def side_of(count: int) -> int:
    """Return the pixels of the longest side of each volume, fewer where there are many volumes."""
    return next(side for most, side in SIDES if count <= most)


def gallery(cards: Sequence[Card], noun: str = "volume", flat: bool = False) -> str:
    """Return the cards and what chooses among them; without scripts, all of them are in sight.

    Args:
        cards: Cards in their first order.
        noun: Word for what a card shows.
        flat: Whether a card shows one picture, not three slices side by side.
    """
    if not cards:
        return ""
    filters: dict[str, dict[str, None]] = {}
    orders: dict[str, None] = {}
    for card in cards:
        for name, value in card.filters.items():
            filters.setdefault(name, {}).setdefault(value)
        orders |= dict.fromkeys(card.orders)
    chosen = {name: list(values) for name, values in filters.items() if 1 < len(values) <= MOST_KINDS}
    parts = [f'<div class="controls" data-noun="{escape(noun, quote=True)}">']
    parts.append(f'<label>search <input type="search" placeholder="name of a {escape(noun)}"></label>')
    for number, (name, values) in enumerate(chosen.items()):
        options = "".join(f"<option>{_safe(value)}</option>" for value in sorted(values))
        parts.append(
            f'<label>{_safe(name)} <select data-f="f{number}"><option value="">all</option>{options}'
            "</select></label>"
        )
    if orders:
        options = "".join(
            f'<option value="o{number}">{_safe(name)}</option>' for number, name in enumerate(orders)
        )
        parts.append(
            f'<label>order <select class="order"><option value="">as listed</option>{options}'
            "</select></label>"
        )
    if any('class="over"' in card.picture for card in cards):
        parts.append('<label><input type="checkbox" class="toggle" checked> outlines</label>')
    width = 230 if flat else 360 if len(cards) <= SIDES[1][0] else 310
    parts.append(f'<span class="pages"></span></div><div class="gallery" style="--card:{width}px">')
    parts += [_card(card, list(chosen), list(orders)) for card in cards]
    return "\n".join([*parts, "</div>"])


def _card(card: Card, filters: Sequence[str], orders: Sequence[str]) -> str:
    attributes = "".join(
        f' data-f{number}="{_safe(card.filters.get(name, ""))}"' for number, name in enumerate(filters)
    )
    for number, name in enumerate(orders):
        value = card.orders.get(name)
        attributes += f' data-o{number}="{"" if value is None else f"{value:.6g}"}"'
    lines = "".join(f"<p>{_safe(line)}</p>" for line in card.lines)
    fault = f'<p class="fault">{_safe(card.fault)}</p>' if card.fault else ""
    return (
        f'<article class="card"{attributes}><h4>{_safe(card.name)}</h4>{card.picture}{fault}{lines}'
        f"{card.extra}</article>"
    )


def _safe(text: str) -> str:
    return escape(printable(text), quote=True)
