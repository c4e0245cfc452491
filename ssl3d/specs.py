"""Words that name encoders on the command line: runs, `scratch:...`, `imagenet:...` and weight files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ssl3d import plugins
from ssl3d.checkpoint.card import WEIGHTS, encoder_folder, read_card
from ssl3d.checkpoint.encoders import load_encoder
from ssl3d.config import from_dict, to_dict, triples
from ssl3d.encoder import Encoder
from ssl3d.errors import CheckpointError, PluginError, UsageError
from ssl3d.yaml_files import parse_yaml

SCRATCH = "scratch:"

IMAGENET = "imagenet:"

FOREIGN = "foreign:"

FOREIGN_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".tar", ".bin")


def encoder_from(spec: str | Path, seed: int = 0) -> Encoder:
    """Load the encoder that a word on the command line means, in evaluation mode.

    Args:
        spec: Run or its `encoder/`, with `:field=value...` for options that leave the weights as they
            are, as in `RUN:stem_stride=1`; or `zoo:NAME`, as a run (`ssl3d.checkpoint.zoo`); or
            `scratch:NAME[:kind][:field=value...]` for an untrained one, as in
            `scratch:resnet18:acs:width=32:stem_stride=1`; or
            `imagenet:NAME[:kind][:field=value...][:weights=FILE]` for a 2D network with ImageNet's weights
            made 3D, as in `imagenet:mobilenet_v2:acs`, with the fields of
            `ssl3d.convert.config.ConvertedConfig`; or another toolkit's weights,
            `FILE.pth[:kind][:field=value...]` (also .pt, .ckpt, .safetensors; `foreign:FILE` whatever its
            name), as `ssl3d.convert.foreign.from_spec` reads them.
        seed: Seed of an untrained encoder's weights.

    Raises:
        UsageError: The words name no encoder or no option of it.
        CheckpointError: There is no such encoder, or its weights cannot be had or are damaged.

    Example:
        >>> encoder_from("scratch:resnet10:width=4").channels
        (4, 4, 8, 16, 32)
    """
    text = str(spec)
    if text.startswith(IMAGENET):
        from ssl3d.convert.named import from_spec

        # A file's name may hold colons: it comes last.
        before, given, file = text.removeprefix(IMAGENET).partition(":weights=")
        network, *options = before.split(":")
        fields = fields_of(options)
        return from_spec(text, {"network": network, **fields, **({"weights": file} if given else {})})
    if not text.startswith(SCRATCH):
        if is_foreign(text):
            from ssl3d.convert.foreign import from_spec as from_file

            file, options = file_and_words(text)
            return from_file(text, file, fields_of(options))
        place, options = _place_and_words(text)
        changes = fields_of(options)
        return load_encoder(place, _whole(changes, place) if changes else None)
    name, *words = text.removeprefix(SCRATCH).split(":")
    try:
        name, kind = plugins.find(plugins.ENCODERS, name)
    except PluginError as error:
        raise UsageError(f"{text}: {error}") from error
    config = from_dict(kind.Config, triples(kind.Config, fields_of(words)), text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: Encoder = kind(config)
    encoder.metadata = {"architecture": name, "config": to_dict(config), "scratch": text, "seed": seed,
                        "steps": 0, "identities": [], "labels_seen": False}  # fmt: skip
    return encoder.eval()


def is_foreign(spec: str) -> bool:
    """Tell whether a word for an encoder is a file of weights that ssl3d did not write."""
    if spec.startswith(FOREIGN):
        return True
    if spec.startswith((SCRATCH, IMAGENET)) or Path(spec).is_dir():
        return False
    file = _FILE.match(spec)
    return file is not None and not Path(file[1]).is_dir() and Path(file[1]).name != WEIGHTS


_WORD = r":(?:network=[^:\\]*|[^:/\\]*)"  # timm's networks are named with a slash
_FILE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, FOREIGN_FILES))}))((?:{_WORD})*)$")


def file_and_words(spec: str) -> tuple[str, list[str]]:
    """Split off the file that `is_foreign` saw from the words that follow it."""
    text = spec.removeprefix(FOREIGN)
    match = None if Path(text).is_file() else _FILE.match(text)
    if match is None:
        return _place_and_words(text)
    return match[1], match[2].split(":")[1:]


def _place_and_words(text: str) -> tuple[str, list[str]]:
    """Split `RUN:field=value:...`; a folder whose own name looks so stays whole."""
    parts = re.split(r":(?=[A-Za-z_]\w*=)", text)
    there = (n for n in range(len(parts), 0, -1) if Path(":".join(parts[:n])).exists())
    end = next(there, 1)
    return ":".join(parts[:end]), parts[end:]


def _whole(changes: dict[str, Any], place: str) -> dict[str, Any]:
    """Repeat single numbers in changes to a saved encoder, where its options are triples."""
    name = str(read_card(encoder_folder(Path(place)))["architecture"])
    try:
        return triples(plugins.load(plugins.ENCODERS, name).Config, changes)
    except PluginError:
        return changes  # `load_encoder` says it


def fitting(spec: str, channels: int) -> str:
    """Add the volumes' channels to a word for an encoder whose channels are free, if it names none.

    Example:
        >>> fitting("scratch:resnet18", 2)
        'scratch:resnet18:in_channels=2'
    """
    free = spec.startswith((SCRATCH, IMAGENET)) or is_foreign(spec)
    if not free or "in_channels" in spec or channels == 1:
        return spec
    words, given, file = spec.partition(":weights=")
    return f"{words}:in_channels={channels}{given}{file}"


def fields_of(words: list[str]) -> dict[str, Any]:
    """Read options from words.

    Example:
        >>> fields_of(["acs", "width=32", "stem_stride=1,1,1"])
        {'kind': 'acs', 'width': 32, 'stem_stride': [1, 1, 1]}
    """
    fields: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            key, value = "kind", word
        try:  # [[1,1,1],[2,2,2]] is a list already, 1,1,1 and [1,1,1],[2,2,2] are what is in one
            fields[key] = parse_yaml(value)
        except ValueError:
            fields[key] = value
        if "," in value and not isinstance(fields[key], list):
            fields[key] = parse_yaml(f"[{value}]")
    return fields


def pooled_by(pool: str, encoder: Encoder, spec: str) -> Encoder:
    """Return the encoder, with pool `aggregator` so that it embeds by the aggregator beside it.

    Args:
        pool: Pooling: mean or aggregator.
        encoder: Encoder, loaded from `spec`.
        spec: Word for the encoder on the command line.

    Raises:
        CheckpointError: No aggregator travelled with this encoder.
    """
    if pool != "aggregator":
        return encoder
    from ssl3d.checkpoint.travellers import load_traveller
    from ssl3d.heads.aggregator import AggregatedEncoder, SliceAggregator

    hint = "--pool aggregator needs an encoder that intra_inter trained"
    if spec.startswith(SCRATCH):
        raise CheckpointError(f"{spec}: untrained, without an aggregator; {hint}")
    try:
        aggregator = load_traveller(spec, "aggregator")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {hint}") from error
    assert isinstance(aggregator, SliceAggregator)
    return AggregatedEncoder(encoder, aggregator).eval()
