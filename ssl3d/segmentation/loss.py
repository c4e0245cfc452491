"""Cross-entropy plus soft Dice over annotated voxels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1
"""Target value of a voxel that nobody annotated."""


def dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    batch_dice: bool = True,
    background: bool = False,
    weights: tuple[float, float] = (1.0, 1.0),
    smooth: float = 1e-5,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Add cross-entropy over annotated voxels and 1 less the mean soft Dice of the classes.

    The soft Dice of a class is (2 sum p t + s) / (sum p + sum t + s) over annotated voxels, of the whole
    batch or of each example; a class that is neither there nor predicted counts 1 (Milletari et al.:
    V-Net, 3DV 2016, arXiv 1606.04797, without squares; batch Dice as of nnU-Net, Isensee et al. 2021).
    Unannotated voxels change neither value nor gradient. Without any annotated voxel the loss is 0.

    Args:
        logits: Logits (B, K, ...).
        target: Class indices (B, ...), int64; `IGNORE` where unannotated.
        batch_dice: Whether to sum over the batch, so that a small class missing from one crop costs
            nothing; else the Dice is the mean over examples.
        background: Whether class 0 counts in the Dice.
        weights: Weights of cross-entropy and Dice.
        smooth: Smoothing term s of the Dice.

    Returns:
        The loss, and its parts `ce` and `dice_loss`, detached.

    Example:
        >>> logits, target = torch.zeros(1, 2, 4), torch.tensor([[0, 1, 1, IGNORE]])
        >>> loss, parts = dice_ce_loss(logits, target)
        >>> round(float(loss), 3), round(float(parts["ce"]), 3)
        (1.122, 0.693)
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float().flatten(2)
        target = target.flatten(1)
        known = target != IGNORE
        # Per annotated voxel, whichever example has how many of them.
        entropy = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        entropy = entropy / known.sum().clamp(min=1)
        first = 0 if background else 1
        probability = (logits.softmax(dim=1) * known.unsqueeze(1))[:, first:]
        classes = logits.shape[1]
        truth = F.one_hot(target.clamp(min=0), classes).movedim(-1, 1)[:, first:] * known.unsqueeze(1)
        axes = (0, 2) if batch_dice else (2,)
        both = (probability * truth).sum(dim=axes)
        sizes = probability.sum(dim=axes) + truth.sum(dim=axes)
        dice = 1 - ((2 * both + smooth) / (sizes + smooth)).mean()
        loss = weights[0] * entropy + weights[1] * dice
    return loss, {"ce": entropy.detach(), "dice_loss": dice.detach()}
