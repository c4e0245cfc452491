"""Folders for the Hugging Face hub: weights and card as they are, and a model card to read."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssl3d.amounts import printable
from ssl3d.checkpoint.card import WEIGHTS as ENCODER_WEIGHTS
from ssl3d.checkpoint.card import without_places
from ssl3d.checkpoint.encoders import load_encoder
from ssl3d.checkpoint.models import CARD, WEIGHTS, card_for_others, load_model
from ssl3d.checkpoint.volumes_seen import HASHES
from ssl3d.encoder import Encoder
from ssl3d.errors import TransientError, UsageError
from ssl3d.export.options import ExportOptions
from ssl3d.export.source import Source, require_equal
from ssl3d.json_files import parse_json

TOKEN = "HF_TOKEN"
"""Variable of the environment that holds the token for an upload; its value is shown nowhere."""
_EXTRA = 'needs huggingface_hub; pip install "ssl3d[export]"'


def write_hub(source: Source, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Write the weights, their card and a README.md, read again by huggingface_hub and by ssl3d.

    Args:
        source: What is exported.
        folder: Folder to write into.
        options: Options of the command, of which `licence` counts.

    Raises:
        UsageError: huggingface_hub is missing, or options were changed after the training.
        TrainingError: The weights differ.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(f"--to hf: {_EXTRA}") from error
    if source.card.get("changed"):
        raise UsageError(
            f"--to hf: {source.word}: has other options than it was trained with; leave them out"
        )
    for path in sorted(source.folder.iterdir()):
        if path.suffix == ".json":
            (folder / path.name).write_text(_for_others(path), encoding="utf-8")
        elif path.suffix == ".safetensors" or path.name == HASHES:
            shutil.copyfile(path, folder / path.name)
    licence = options.licence or str(source.card.get("licence") or "")
    (folder / "README.md").write_text(_readme(source, licence), encoding="utf-8")
    huggingface_hub.ModelCard.load(folder / "README.md")
    weights = ENCODER_WEIGHTS if isinstance(source.module, Encoder) else WEIGHTS
    own = source.module if isinstance(source.module, Encoder) else source.module.network
    theirs = copy.deepcopy(own)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            value.zero_()
    pattern = weights.replace(".safetensors", "{suffix}.safetensors")
    huggingface_hub.load_torch_model(theirs, folder, strict=True, filename_pattern=pattern)
    again = load_encoder(folder) if isinstance(source.module, Encoder) else load_model(folder).network
    worst = max(_apart(own, theirs), _apart(own, again))
    require_equal(worst, f"--to hf of {source.word}")
    return {"weights": weights, "licence": licence or "unknown", "largest_difference": worst}


def _for_others(path: Path) -> str:
    """Write a file of JSON anew without the places of files on this machine."""
    content = parse_json(path.read_bytes())
    if path.name == CARD:
        return card_for_others(content)
    return json.dumps(without_places(content), indent=1) + "\n"


def push(folder: Path, repository: str) -> str:
    """Write a folder to a private repository of the hub, and return its address.

    Raises:
        UsageError: There is no token in the environment.
        TransientError: The hub refused it or cannot be reached.
    """
    token = os.environ.get(TOKEN, "")
    if not token:
        raise UsageError(f"--push {repository}: set {TOKEN} to a token that may write there")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(f"--push: {_EXTRA}") from error
    try:
        hub = huggingface_hub.HfApi(token=token)
        address = str(hub.create_repo(repository, private=True, exist_ok=True))
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="ssl3d export")
    except Exception as error:  # of many kinds, by the client below
        reason = " ".join(str(error).split()).replace(token, "***")[:200]
        raise TransientError(
            f"--push {repository}: not uploaded ({type(error).__name__}: {reason}); {folder} is complete"
        ) from None
    return address


def _apart(first: torch.nn.Module, second: torch.nn.Module) -> float:
    """Return the largest difference between the weights of two networks."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    values = [(a.double() - b.double()).abs().max() for a, b in pairs if a.numel()]
    return float(torch.stack(values).max())


# The model card ------------------------------------------------------------------------------------


def _readme(source: Source, licence: str) -> str:
    from huggingface_hub import ModelCardData

    card = source.card
    task = card.get("task") or {}
    name = str((card.get("architecture") or {}).get("name")) if task else str(card["architecture"])
    datasets = (card.get("training") or card.get("data") or {}).get("datasets") or []
    kind = "image-segmentation" if task.get("name") == "segmentation" else None
    data = ModelCardData(
        license=licence or "unknown",
        library_name="ssl3d",
        tags=["medical", "3d", "ssl3d", name, *([str(task["name"])] if task else ["feature-extraction"])],
        pipeline_tag=kind,
    )
    described = f"a network for {task['name']} on an encoder {name}" if task else f"an encoder {name}"
    title = f"{name}, {task['name']}" if task else f"{name}, pretrained"
    channels = f"{source.channels} channel{'s' * (source.channels > 1)}"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_plain(title)}\n",
        f"This is {_plain(described)} of {channels}, trained with ssl3d "
        f"{_plain((card.get('versions') or {}).get('ssl3d', ''))}.\n",
        "## Use\n",
        _use(bool(task)),
        "## Data\n",
        _data(card, datasets),
        "## Licence\n",
        (
            f"{_plain(licence)}\n"
            if licence
            else "Nobody has stated one. Ask whoever trained it before you use it.\n"
        ),
        "## Intended use\n",
        "Research on volumes like those it was trained on. It is no medical device, and no decision about "
        "a patient may rest on it.\n",
        "## Scores\n",
        _scores(card),
        "## Limits\n",
        _limits(card),
        "## Citations\n",
        "\n".join(
            f"- {_plain(text)}" for text in dict.fromkeys(map(str, (card.get("citations") or {}).values()))
        )
        or "- none",
        "",
    ]
    return "\n".join(parts)


def _use(model: bool) -> str:
    if model:
        return (
            "```console\n$ ssl3d predict THIS_FOLDER --data scans/ --out predicted\n```\n\n"
            'In Python, `ssl3d.load_model("THIS_FOLDER").predict(volume)`. `model.json` says all of it, '
            "classes and preparation too.\n"
        )
    return (
        "```python\nimport ssl3d\n\n"
        'encoder = ssl3d.load_encoder("THIS_FOLDER")\nembedding = encoder.embed(volumes)  '
        "# (batch, channel, D, H, W)\n"
        "```\n\n`encoder.json` says all of it, preparation too.\n"
    )


def _data(card: Mapping[str, Any], datasets: list[Any]) -> str:
    volumes = (card.get("training") or {}).get("volumes") or (card.get("data") or {}).get("volumes")
    if isinstance(volumes, Mapping):
        volumes = ", ".join(f"{count} for {part}" for part, count in volumes.items())
    spacing = card.get("spacing") or {}
    sides = spacing.get("median") if isinstance(spacing, Mapping) else spacing
    lines = [
        f"- data sets: {', '.join(map(_plain, datasets)) or 'not known'}",
        f"- volumes: {_plain(volumes or 'not known')}",
        *([f"- median spacing: {_triple(sides)} mm along D, H, W"] if sides else []),
        *(f"- {word}: {_plain(', '.join(card[key]))}"
          for key, word in (("orientations", "orientations"), ("normalize", "normalisation"))
          if card.get(key)),
        *([f"- classes: {', '.join(_plain(kind['name']) for kind in card['classes'])}"]
          if card.get("classes") else []),
        f"- pretext tasks: {', '.join(map(_plain, card['proxies']))}" if card.get("proxies") else "",
        "- subjects: the card holds hashes of their names, for the check of leaks, and no names",
    ]  # fmt: skip
    return "\n".join(line for line in lines if line) + "\n"


def _scores(card: Mapping[str, Any]) -> str:
    scores = card.get("scores") or {}
    if not scores:
        return "None are known: an encoder is scored by what is built on it (`ssl3d linear-probe`).\n"
    intervals = card.get("intervals") or {}
    rows = ["| score | value | 95 % interval |", "|---|---|---|"]
    for name, value in scores.items():
        low, high = intervals.get(name) or (None, None)
        span = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        rows.append(f"| {_plain(name)} | {'undefined' if value is None else f'{value:.4g}'} | {span} |")
    on = "On test subjects that it was neither trained nor chosen on."
    if seen := card.get("seen_test_subjects"):
        on += f" Its pretraining saw {seen} of them, so the scores do not hold for other people."
    return "\n".join(rows) + f"\n\n{on}\n"


def _limits(card: Mapping[str, Any]) -> str:
    spacing = card.get("spacing")
    lines = ["It has been seen on the data above alone; other scanners, diseases and ages are untested."]
    if isinstance(spacing, Mapping) and spacing.get("low"):
        lines.append(
            f"Its training had voxels of {_triple(spacing['low'])} to {_triple(spacing['high'])} mm."
        )
    if card.get("labels_seen"):
        lines.append("The pretraining saw labels.")
    if (card.get("folds") or 1) > 1:
        lines.append(
            f"It is fold {card.get('fold')} of {card['folds']}; the scores are those of all folds."
        )
    return " ".join(lines) + "\n"


def _triple(sides: Any) -> str:
    return " x ".join(f"{float(side):.4g}" for side in sides)


def _plain(text: Any) -> str:
    """Keep what a name holds from being Markdown or HTML."""
    line = printable(" ".join(str(text).split()))
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in line)
