"""The suite file of a study, from what was looked at and planned."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ssl3d.api import UsageError, holds_scans
from ssl3d_benchmarks.study.look import Look
from ssl3d_benchmarks.study.options import StudyOptions
from ssl3d_benchmarks.study.plan import Design
from ssl3d_benchmarks.study.recipes import Recipes, words_of

STORE = "scans"
TASK = "finetune"
IMAGENET = "imagenet"


@dataclass(frozen=True)
class Sources:
    """Data of a study in the words of a suite.

    Attributes:
        stores: Stores of the suite: the scans to prepare or phantoms; none where stores were given.
        data: What follows --data.
    """

    stores: dict[str, str]
    data: str


def sources_of(options: StudyOptions) -> Sources:
    """Write the scans of a study as a suite does, with whole paths: it is run again from anywhere.

    Raises:
        UsageError: A path has a character that suites use, or stores come with other words.
        DataError: A path is missing.
    """
    scans = options.scans
    if len(scans) == 1 and scans[0].split(":")[0] == "phantoms":
        return Sources({STORE: scans[0]}, f"{{{STORE}}}")
    paths = [str(Path(scan).resolve()) for scan in scans]
    for path in paths:
        if set(path) & set("|{}"):
            raise UsageError(f"{path}: a suite takes no path with | {{ or }}; give the folder another name")
    if holds_scans(paths):
        words = [*map(shlex.quote, paths), options.prepare]
        return Sources({STORE: " ".join(filter(None, words))}, f"{{{STORE}}}")
    if options.prepare:
        raise UsageError(f"--prepare {options.prepare}: {scans[0]} is prepared already, so leave it out")
    return Sources({}, shlex.join(paths))


def content_of(
    options: StudyOptions,
    sources: Sources,
    look: Look,
    recipes: Recipes,
    imagenet: str,
    design: Design,
    steps: tuple[int, int],
) -> dict[str, Any]:
    """Return the content of the suite.

    Args:
        options: Options of the study.
        sources: Data of the study.
        look: What the data are.
        recipes: Recipes of pretraining, of which the design takes the first.
        imagenet: Encoder with ImageNet's weights; empty for none.
        design: Parts of the study.
        steps: Steps of the first recipe, and of every fine-tuning; 0 leaves the latter to the task.
    """
    names = recipes.names[: design.recipes]
    contestants = {"scratch": f"scratch:{options.encoder}"}
    if imagenet and design.imagenet:
        contestants[IMAGENET] = imagenet
    words = ["--data", sources.data, "--task", look.task]
    if look.task == "classification":
        words += ["--classification.target", look.target]
    if look.folds:
        words += ["--folds", str(look.folds)]
    words += ["--fractions", *(f"{share:g}" for share in (*design.few, 1.0))]
    words += ["--repeats", str(design.repeats)]
    if steps[1]:
        words += ["--steps", str(steps[1])]
    return {
        "description": f"does pretraining pay on {', '.join(look.datasets)}? Planned by ssl3d study",
        "encoder": encoder_flags(options.encoder),
        "budget": {"run": names[0], "steps": steps[0]},
        "seeds": list(range(design.seeds)),
        **({"stores": sources.stores} if sources.stores else {}),
        "runs": {name: words_of(name, look, sources.data) for name in names},
        "contestants": contestants,
        "tasks": {
            TASK: {"protocol": "finetune", "runs": ["*"], "contestants": ["*"], "options": " ".join(words)}
        },
    }


def suite_text(content: dict[str, Any], plan: Sequence[str]) -> str:
    """Write a suite as YAML below the plan as a comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in "\n".join(plan).split("\n"))
    return head + yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)


def encoder_flags(spec: str) -> str:
    """Write an encoder's name and options as flags of `ssl3d pretrain`.

    Example:
        >>> encoder_flags("resnet18:acs:stem_stride=1,1,1")
        '--encoder resnet18 --resnet18.kind acs --resnet18.stem_stride [1,1,1]'
    """
    name, *words = spec.split(":")
    flags = [f"--encoder {name}"]
    for word in words:
        key, equals, value = word.partition("=")
        key, value = (key, value) if equals else ("kind", word)
        listed = "," in value and not value.startswith("[[")
        flags.append(f"--{name}.{key} {f'[{value}]' if listed and value[0] != '[' else value}")
    return " ".join(flags)


def imagenet_of(options: StudyOptions) -> tuple[str, str]:
    """Return the encoder with ImageNet's weights, or an empty text; and where they are from or missing.

    Raises:
        UsageError: The file that is named is not there.
    """
    network, *rest = options.encoder.split(":")
    kind = next((word for word in rest if "=" not in word), "acs")
    if options.imagenet.startswith("imagenet:"):
        file = options.imagenet.partition(":weights=")[2]
        if file and not Path(file).is_file():
            raise UsageError(f"--imagenet {options.imagenet}: no such file")
        whole = options.imagenet.replace(f":weights={file}", f":weights={Path(file).resolve()}")
        return (whole if file else options.imagenet), "as asked for"
    if options.imagenet:
        if not Path(options.imagenet).is_file():
            raise UsageError(f"--imagenet {options.imagenet}: no such file")
        return f"imagenet:{network}:{kind}:weights={Path(options.imagenet).resolve()}", "as asked for"
    place = Path(torch.hub.get_dir()) / "checkpoints"
    files = sorted(place.glob(f"{network}-*.pth"))
    if files:
        return f"imagenet:{network}:{kind}:weights={files[0]}", f"found in {place}"
    return "", f"no ImageNet arm: there are no weights of {network} in {place}; --imagenet FILE adds one"
