"""What the rows of a leaderboard are called: as short as tells them apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl3d_benchmarks.leaderboard.report.board import Arm
    from ssl3d_benchmarks.leaderboard.report.records import Table


def label(arms: Sequence[Arm], table: Table) -> None:
    """Give every arm the shortest name that no other has."""
    facets: list[Callable[[Arm], str]] = [
        _method,
        lambda arm: _at(arm),
        lambda arm: relation(arm, table),
        lambda arm: "norm recalibrated" if arm.first.recalibrated else "",
        learning_rates,
        lambda arm: str(arm.first.result.contestant.get("group", "")).removeprefix("scratch:"),
        lambda arm: str(arm.first.result.contestant.get("pool") or ""),
        lambda arm: _words_of(arm, "init"),
        lambda arm: _words_of(arm, "batch_size"),
        lambda arm: _words_of(arm, "lr"),
        lambda arm: _words_of(arm, "optimizer"),
        lambda arm: arm.first.stem,
        lambda arm: str(arm.first.result.contestant["name"]).partition(",")[0],
        lambda arm: str(arm.first.result.contestant["digest"])[:8],
    ]
    names = [[word for word in (facets[0](arm), decoder_words(arm)) if word] for arm in arms]
    for facet in facets[1:]:
        counts = Counter(map(tuple, names))
        crowded = [k for k, name in enumerate(names) if counts[tuple(name)] > 1]
        groups: dict[tuple[str, ...], set[str]] = {}
        for k in crowded:
            groups.setdefault(tuple(names[k]), set()).add(facet(arms[k]))
        added = {}
        for k in crowded:
            words = facet(arms[k])
            if len(groups[tuple(names[k])]) > 1 and words and words not in names[k]:
                added[k] = words
        for k, words in added.items():
            names[k].append(words)
    for arm, name in zip(arms, names, strict=True):
        arm.label = ", ".join(name)

    titles = [titled(arm) for arm in arms]
    for arm, title in zip(arms, titles, strict=True):
        arm.title = title if titles.count(title) == 1 else titled(arm, True)


METHODS = {
    "simclr": "SimCLR",
    "barlow_twins": "Barlow Twins",
    "pcl": "Positional contrast",
    "glcl": "Global and local contrast",
    "mae": "MAE",
    "models_genesis": "Models Genesis",
    "transvw": "TransVW",
    "swav": "SwAV",
    "deepcluster_v2": "DeepCluster-v2",
    "intra_inter": "Intra-inter",
    "sorting": "Slice sorting",
    "cube_ordering": "Cube ordering",
    "context_restoration": "Context restoration",
    "pseudo3d_classification": "Pseudo-3D classification",
    "pseudo3d_detection": "Pseudo-3D detection",
    "med3d": "Med3D",
    "faster_rcnn": "Faster R-CNN",
}
"""Names that people use of the proxies that come with ssl3d; others keep their own."""

NETWORKS = {
    "mobilenet_v2": "MobileNetV2",
    "vit": "ViT",
    "swin": "Swin",
    "resenc": "ResEnc",
    "genesis_unet": "Genesis U-Net",
}
KINDS = {
    "acs": "ACS",
    "soft-acs": "soft ACS",
    "i3d": "I3D",
    "p3d": "P3D",
    "2.5d": "2.5D",
    "3d": "3D",
    "triplanar": "triplanar",
}


def worded(text: str) -> str:
    """Return a text with the names that people use of the proxies in it.

    Example:
        >>> worded("simclr, own data; my_simclr")
        'SimCLR, own data; my_simclr'
    """
    return re.sub(r"(?<![\w:=/.-])\w+(?![\w:=/.-])", lambda match: _known(match[0]), text)


def titled(arm: Arm, full: bool = False) -> str:
    """Name a contestant as people would: its label, with the names of publications for its words.

    Args:
        arm: Contestant that has a label.
        full: Whether every option of its network is named.
    """
    group = str(arm.first.result.contestant.get("group", "")).removeprefix("scratch:")
    words = []
    for part in arm.label.split(", "):
        if part == group and group:
            words.append(network_title(arm, full))
        elif part.startswith("ImageNet ") and arm.kind == "imagenet":
            words.append("ImageNet " + _network(part.removeprefix("ImageNet "), full))
        elif part in ("own data", data_words(arm, "on ")) and any(_modalities(arm)):
            words.append(data_words(arm))
        else:
            method, after, start = part.partition(" after ")
            words.append(" + ".join(map(_known, method.split(" + "))) + after + start)
    return ", ".join(words)


def network_title(arm: Arm, full: bool = False) -> str:
    """Name the network of a contestant: architecture, kind of convolution, width, and the rest in full."""
    who = arm.first.result.contestant
    group = str(who.get("group") or "").removeprefix("scratch:")
    config = (who.get("architecture") or {}).get("config")
    kind = str(config.get("kind") or "") if isinstance(config, Mapping) else ""
    return _network(f"{group}:kind={kind}" if group and kind and "kind=" not in group else group, full)


def _known(method: str) -> str:
    return METHODS.get(method, method)


def _network(group: str, full: bool) -> str:
    name, *parts = group.split(":")
    kind = width = ""
    rest = []
    for part in parts:
        key, equals, value = part.partition("=")
        if key == "network":
            name = value
        elif (not equals and key in KINDS) or key == "kind":
            kind = KINDS.get(value or key, value or key)
        elif key == "width":
            width = f"width {value}"
        elif full:
            same = re.sub(r"\[(\d+),\1,\1\]", r"\1", value)  # [2,2,2] along D, H, W
            rest.append(f"{key.replace('_', ' ')} {same}".strip())
    numbered = re.fullmatch(r"(resnet|densenet)(\d+)", name)
    known = {"resnet": "ResNet", "densenet": "DenseNet"}
    name = f"{known[numbered[1]]}-{numbered[2]}" if numbered else NETWORKS.get(name, name)
    return " ".join(word for word in (name, kind, width, *rest) if word)


def _method(arm: Arm) -> str:
    who = arm.first
    if who.kind == "pretrained":
        words = " + ".join(who.proxies) or who.stem
        init = str((who.pretraining.get("init") or {}).get("from", ""))
        return f"{words} after ImageNet" if init.startswith("imagenet:") else words
    if who.kind == "imagenet":
        name = str(who.result.contestant["name"])
        if not name.startswith("imagenet:"):
            return who.stem  # a name that somebody chose
        return "ImageNet " + re.sub(r":weights=[^:]*", "", name.removeprefix("imagenet:"))
    if who.kind == "scratch":
        return scratch_words(who.result.task)
    return str(who.result.contestant["name"])


def _at(arm: Arm) -> str:
    return "" if arm.first.share is None else f"at {arm.first.share} %"


def relation(arm: Arm, table: Table) -> str:
    """Say which data a contestant was pretrained on; an empty string where it was not."""
    if arm.kind != "pretrained":
        return ""
    names = set(_trained_on(arm))
    if not names:
        return ""
    if names == set(table.dataset):
        return "own data"
    return "on " + " + ".join(sorted(names))


def data_words(arm: Arm, before: str = "") -> str:
    """Name the data of pretraining as people would: each data set, with its modality where that is known.

    Args:
        arm: Contestant that was pretrained.
        before: Word before the names; with one, there are no modalities.
    """
    names = sorted(set(_trained_on(arm)))
    if before:
        return before + " + ".join(names)
    known = dict(zip(names, _modalities(arm), strict=True))
    return " + ".join(f"{name} {known[name]}".strip() for name in names)


def _modalities(arm: Arm) -> list[str]:
    """Return the modality of each data set of pretraining, in the order of their names; "" for unknown."""
    kinds = (arm.first.pretraining.get("data") or {}).get("modalities")
    known = kinds if isinstance(kinds, Mapping) else {}
    return [str(known.get(name) or "") for name in sorted(set(_trained_on(arm)))]


def decoder_words(arm: Arm) -> str:
    """Say that a contestant's head started from a pretrained decoder; empty where it did not."""
    return "with decoder" if arm.first.result.contestant.get("decoder") else ""


def learning_rates(arm: Arm) -> str:
    """Name the learning rates that were tried; empty where a protocol has none."""
    rates = arm.first.rates
    return f"learning rate {' '.join(f'{rate:g}' for rate in rates)}" if rates else ""


def _words_of(arm: Arm, key: str) -> str:
    """Name a part of the recipe of pretraining; empty where the records do not have it."""
    recipe: Mapping[str, Any] = max((record.recipe for record in arm.records()), key=len)
    value = recipe.get(key)
    if not value:
        return ""
    if key == "init":
        return f"after {value['from']}"
    return {"batch_size": "batch ", "lr": "rate "}.get(key, "") + str(value)


def _trained_on(arm: Arm) -> list[str]:
    return list((arm.first.pretraining.get("data") or {}).get("datasets") or ())


def across(arm: Arm, table: Table | None) -> str:
    """Name a contestant over tasks; without a table, so that the name holds on any."""
    group = str(arm.first.result.contestant.get("group", "")).removeprefix("scratch:")
    names = sorted(set(_trained_on(arm))) if arm.kind == "pretrained" else []
    on = "on " + " + ".join(names) if names else ""
    words = [_method(arm), on if table is None else relation(arm, table)]
    words += [group] if arm.kind in ("pretrained", "scratch") else []
    words += [decoder_words(arm)]
    words += ["norm recalibrated"] if arm.first.recalibrated else []
    words += [str(arm.first.result.contestant.get("pool") or "")]
    return ", ".join(word for word in words if word)


def scratch_words(task: str) -> str:
    """Name the rows without pretraining: fine-tuned ones have been trained."""
    return "from scratch" if task.startswith("finetune") else "untrained"
