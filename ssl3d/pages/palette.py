"""Colours, names and numbers of the classes in pictures, the same wherever masks are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection

Array = NDArray[Any]

COLOURS = ("#e6550d", "#3182bd", "#31a354", "#756bb1", "#d6616b", "#e7ba52", "#17becf", "#8c6d31")
BOX = "#31a354"
"""Colour of true boxes, which the style sheet of `ssl3d view` has too."""


def colour(k: int) -> str:
    """Return the colour of class k, of which 0 is the background and has none."""
    return COLOURS[(k - 1) % len(COLOURS)]


def class_titles(data: Collection, values: Sequence[int | str]) -> list[str]:
    """Name mask values as the scans' own list does, where all data sets agree: `1 (anterior)`, else `1`.

    Args:
        data: Volumes with masks.
        values: Mask values, background first.
    """
    listed = [store.settings.get("mask_labels") or {} for store in data.stores]
    every = [names for by_dataset in listed for names in by_dataset.values() if isinstance(names, dict)]
    titles = []
    for value in map(str, values):
        names = {str(own[value]) for own in every if value in own}
        titles.append(f"{value} ({names.pop()})" if len(names) == 1 else value)
    return titles


def legend(figure: Any, titles: Sequence[str]) -> None:
    """Put the colours and names of the classes below a picture."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour(k), label=title) for k, title in enumerate(titles) if k]
    figure.legend(
        handles=handles, loc="outside lower center", ncol=min(len(handles), 6), fontsize=8, frameon=False
    )


def dice_words(truth: Array, predicted: Array, titles: Sequence[str]) -> str:
    """Return the Dice of each class of a volume in words; a dash where neither side has the class.

    Args:
        truth: True class indices, negative where unknown.
        predicted: Predicted class indices of the same shape.
        titles: Names of the classes, background first.

    Example:
        >>> import numpy as np
        >>> dice_words(np.array([0, 1, 1]), np.array([0, 1, 0]), ["0", "1 (liver)", "2"])
        'Dice 1 (liver) 0.67, 2 –'
    """
    known = truth >= 0
    words = []
    for k, title in enumerate(titles):
        if k == 0:
            continue
        a, b = (truth == k) & known, (predicted == k) & known
        total = int(a.sum() + b.sum())
        words.append(f"{title} {2 * int((a & b).sum()) / total:.2f}" if total else f"{title} –")
    return "Dice " + ", ".join(words)
