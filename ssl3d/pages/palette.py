"""Colours, names and numbers of the classes in pictures, the same wherever masks are drawn."""

from __future__ import annotations

import textwrap
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
    """Put the colours and names of the classes below a picture, which are values of its masks."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour(k), label=title) for k, title in enumerate(titles) if k]
    widest = 50 + 5 * max((len(title) for title in titles[1:]), default=0)  # points: patch, gaps, letters
    columns = max(1, min(len(handles), int(72 * figure.get_figwidth() / widest)))
    figure.legend(
        handles=handles, loc="outside lower center", ncol=columns, fontsize=8, frameon=False,
        title="value in the mask", title_fontsize=8,
    )  # fmt: skip


def dice_words(truth: Array, predicted: Array, titles: Sequence[str], width: int) -> str:
    """Return the Dice of each class in words; a dash where neither side has the class.

    They are of all voxels given, also where a picture shows a single slice, and the words say so.

    Args:
        truth: True class indices (D, H, W), negative where unknown.
        predicted: Predicted class indices of the same shape.
        titles: Names of the classes, background first.
        width: Number of characters in a line; a class and its Dice stay in one.

    Example:
        >>> import numpy as np
        >>> truth, predicted = np.array([[[0]], [[1]], [[1]]]), np.array([[[0]], [[1]], [[0]]])
        >>> dice_words(truth, predicted, ["0", "1 (liver)", "2"], width=60)
        'Dice in the whole volume: 1 (liver) = 0.67, 2 = –'
    """
    known = truth >= 0
    words = []
    for k, title in enumerate(titles):
        if k == 0:
            continue
        a, b = (truth == k) & known, (predicted == k) & known
        total = int(a.sum() + b.sum())
        words.append(f"{title} = {2 * int((a & b).sum()) / total:.2f}" if total else f"{title} = –")
    kept = [each.replace(" ", "\N{NO-BREAK SPACE}") for each in words]
    whole = f"Dice in the whole {'image' if truth.shape[0] == 1 else 'volume'}: " + ", ".join(kept)
    return "\n".join(textwrap.wrap(whole, width)).replace("\N{NO-BREAK SPACE}", " ")
