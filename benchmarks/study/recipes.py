"""Recipes of pretraining that the records under `benchmarks/results/` favour, by the kind of scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssl3d.api import plugins
from ssl3d_benchmarks.study.look import Look

BATCHES = {"simclr": 32, "swav": 32, "barlow_twins": 32}
"""Batch sizes of the proxies' own recipes, where they are not 8."""


@dataclass(frozen=True)
class Recipes:
    """Proxy tasks of a study.

    Attributes:
        names: Proxies, the most favoured first.
        why: Reason for them.
    """

    names: tuple[str, ...]
    why: str


def recipes_for(look: Look, asked: Sequence[str] = ()) -> Recipes:
    """Choose the proxies for data, unless they are asked for.

    Raises:
        PluginError: There is no proxy of a name asked for.
    """
    for name in asked:
        plugins.find(plugins.PROXIES, name)
    if asked:
        return Recipes(tuple(asked), "as asked for")
    if look.images:
        return Recipes(
            ("simclr", "swav"),
            "on images they had the best probes (PneumoniaMNIST: AUC .952 and .945, untrained .929)",
        )
    if look.thick:
        return Recipes(
            ("simclr", "deepcluster_v2"),
            "on thick slices they had the best probes (ACDC: Dice .584 and .580, untrained .474)",
        )
    if look.target in ("masks", "boxes"):
        return Recipes(
            ("context_restoration", "deepcluster_v2"),
            "on volumes with masks they had the best probes (hippocampus: Dice .806 and .801, untrained "
            ".760)",
        )
    return Recipes(
        ("simclr", "deepcluster_v2"),
        "on volumes with labels simclr had the best probe (AdrenalMNIST3D: AUC .864, untrained .810), and "
        "deepcluster_v2 is the best of the others on thick and on isotropic volumes together",
    )


def words_of(name: str, look: Look, data: str) -> str:
    """Return what follows `ssl3d pretrain` for a proxy: whole batches, and crops that fit the volumes."""
    words = ["--proxy", name, "--data", data]
    if look.folds:
        words += ["--subjects", "unlabelled"]
    batch = BATCHES.get(name, 8)
    words += ["--batch-size", str(max(2, min(batch, look.pretrained_on)))]
    name, kind = plugins.find(plugins.PROXIES, name)
    crop = getattr(kind.Config, "crop", None)
    if isinstance(crop, tuple) and len(crop) == 3:
        words += [f"--{name}.crop", *map(str, crop_for(look, crop))]
    # People are few, and a forecast holds for steps alone.
    return " ".join([*words, "--holdout", "0", "--eval-every", "-1"])


def crop_for(look: Look, usual: Sequence[int]) -> tuple[int, int, int]:
    """Return the crop (D, H, W) for volumes: images and stacks of thick slices have flat ones.

    Args:
        look: Shapes and spacing of the data.
        usual: Crop of the proxy, for volumes of about equal sides.
    """
    wide = tuple(usual)
    if look.images:
        wide = (1, 128, 128)
    elif look.thick:
        wide = (8, 64, 64)
    d, h, w = (
        min(side, max(8, length // 8 * 8)) if side > 1 else 1
        for side, length in zip(wide, look.shape, strict=True)
    )
    return d, h, w
