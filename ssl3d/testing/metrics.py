"""The contract of a metric of masks, tested on any function that claims to be one."""

from __future__ import annotations

from ssl3d.segmentation.own_metrics import Metric, load_metric, require_metric


def check_metric(metric: Metric | str) -> None:
    """Check that a function is a metric of masks.

    It takes two boolean masks (D, H, W) and the voxel sides (D, H, W) in mm, and returns a number, higher
    being better, or None where it is undefined. It changes neither mask, gives the same number twice, takes
    empty masks, images (D = 1) and voxels that are no cubes, and calls a perfect prediction better than
    one that misses the object.

    Args:
        metric: Function, or the words that name it in a file: `my/metrics.py:boundary_iou`.

    Raises:
        PluginError: The function is no such metric; the message says what it did.

    Example:
        >>> def recall(predicted, truth, spacing):
        ...     return float((predicted & truth).sum() / truth.sum()) if truth.any() else None
        >>> check_metric(recall)
    """
    if isinstance(metric, str):
        load_metric(metric)
    else:
        require_metric(metric, f"metric {getattr(metric, '__name__', metric)}")
