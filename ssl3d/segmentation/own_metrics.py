"""Metrics of masks that a user defines in a file: `my/metrics.py:boundary_iou`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.errors import PluginError
from ssl3d.plugin_files import code_digest, load_file

Metric = Callable[..., float | None]
"""Function of (predicted, truth, spacing): two masks (D, H, W) of one class, and voxel sides in mm."""

TAKEN = ("dice", "hd95", "surface_dice", "voxels", "dataset", "subject", "id", "region")
"""Names that predictions of masks have already."""

_FILE = re.compile(r"(.+\.py):([A-Za-z_]\w*)")
_RECORDED = re.compile(r"([A-Za-z_]\w*)@[0-9a-f]{16}")


def metric_name(spec: str) -> str:
    """Return the name of a metric, from the words of a user or of a record.

    Raises:
        PluginError: The words name no function in a file.

    Example:
        >>> metric_name("my/metrics.py:boundary_iou"), metric_name("boundary_iou@0123456789abcdef")
        ('boundary_iou', 'boundary_iou')
    """
    named = _FILE.fullmatch(spec) or _RECORDED.fullmatch(spec)
    if not named:
        raise PluginError(f"--metric {spec}: expected FILE.py:FUNCTION, such as my/metrics.py:boundary_iou")
    return named[named.lastindex or 1]


def recorded_metric(spec: str) -> str:
    """Return what a record keeps of a metric: its name, and the digest of what its file computes."""
    named = _FILE.fullmatch(spec)
    if not named:
        return spec
    load_metric(spec)
    return f"{named[2]}@{code_digest(Path(named[1]).expanduser().read_bytes())[:16]}"


@lru_cache(maxsize=32)
def load_metric(spec: str) -> Metric:
    """Load a metric from its file, and check it.

    Raises:
        PluginError: The file does not import, has no such function, or its function is no such metric.
    """
    name, title = metric_name(spec), f"--metric {spec}"
    named = _FILE.fullmatch(spec)
    if not named:
        raise PluginError(f"{title}: a record names the metric, but only its file has it")
    metric = getattr(load_file(Path(named[1]), title), name, None)
    if not callable(metric):
        raise PluginError(f"{title}: the file has no function {name}")
    if name in TAKEN:
        raise PluginError(f"{title}: masks have a score {name} already; give the function another name")
    require_metric(metric, title)
    return metric


def class_values(
    specs: Sequence[str], predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float]
) -> dict[str, float | None]:
    """Compute the metrics of one class of one volume, by name.

    Raises:
        PluginError: A metric fails, or returns what is no number.
    """
    return {
        metric_name(spec): _value(load_metric(spec), f"--metric {spec}", predicted, truth, tuple(spacing))
        for spec in specs
    }


def require_metric(metric: Metric, title: str) -> None:
    """Require that a function is a metric of masks, as `ssl3d.testing.check_metric` describes one.

    Args:
        metric: Function.
        title: Beginning of the message of an error.

    Raises:
        PluginError: The function is no such metric; the message says what it did.
    """
    for shape, spacing in (((6, 8, 7), (3.0, 1.0, 0.5)), ((1, 8, 7), (1.0, 1.0, 1.0))):
        truth, missed, empty = (np.zeros(shape, dtype=bool) for _ in range(3))
        truth[:4, 1:4, 2:5], missed[:, 5:7, 5:7] = True, True
        perfect = _value(metric, title, truth.copy(), truth, spacing)
        wrong = _value(metric, title, missed, truth, spacing)
        where = f"of masks of {' x '.join(map(str, shape))} voxels"
        if perfect is None or wrong is None:
            raise PluginError(f"{title}: it is undefined {where}, though both masks have an object")
        if not perfect > wrong:
            raise PluginError(
                f"{title}: higher must be better, but {where} a perfect prediction has {perfect:.4g} and "
                f"one that misses the object {wrong:.4g}"
            )
        if _value(metric, title, missed, truth, spacing) != wrong:
            raise PluginError(f"{title}: called twice {where}, it gives two numbers")
        for predicted, true in ((empty, truth), (missed, empty), (empty, empty)):
            _value(metric, title, predicted, true, spacing)


def _value(
    metric: Metric,
    title: str,
    predicted: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    spacing: tuple[float, ...],
) -> float | None:
    before = predicted.copy(), truth.copy()
    try:
        value: Any = metric(predicted, truth, spacing)
    except Exception as error:
        raise PluginError(f"{title}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not (np.array_equal(before[0], predicted) and np.array_equal(before[1], truth)):
        raise PluginError(f"{title}: it changes the masks that it is given")
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{title}: it returned {ascii(value)[:40]}, expected a number or None") from error
    if math.isinf(number):
        raise PluginError(f"{title}: it returned {number}, expected a finite number or None")
    return None if math.isnan(number) else number
