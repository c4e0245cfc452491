"""Other toolkits' checkpoints as encoders: recognised by their names, matched strictly, counted."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl3d import plugins
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.checkpoint.weights import (
    state_digest,
    tensor_names,
)
from ssl3d.config import from_dict, to_dict, triples
from ssl3d.convert.foreign_files import WeightsFile, read_file
from ssl3d.convert.foreign_layouts import LAYOUTS
from ssl3d.convert.foreign_recipe import AXES, Layout, Place, Recipe, Source, State, turned
from ssl3d.convert.foreign_resnets import network_name
from ssl3d.convert.foreign_transformers import unreadable
from ssl3d.convert.weights import Match, load_matching
from ssl3d.encoder import Encoder
from ssl3d.errors import CheckpointError, UsageError

# Of several networks in one file, the first in this order is taken; none of the words is better still.
_TWINS = ("teacher", "ema", "student", "momentum", "target", "k", "key")
_OPTIONS = ("layout", "prefix", "network", "axes", "allow_partial", "labels_seen")
_TRIPLE = tuple[int, int, int]
_PLAIN = re.compile(r"(tv_)?resnet(10|18|34|50|101|152|200)")


@dataclass
class Foreign:
    """Encoder made of a foreign file, and how it was made.

    Attributes:
        encoder: Encoder in evaluation mode, with its card as `metadata`.
        match: Counts of the numbers that came from the file.
        layout: Name of the layout of the keys.
        prefix: Prefix that the keys had in the file.
        notes: Notes that a person should know, one line each.
        assumed: What neither the weights nor the file says, such as strides and pools, as it was assumed.
    """

    encoder: Encoder
    match: Match
    layout: str
    prefix: str
    notes: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        card = self.encoder.metadata
        about = card["foreign"]
        lines = [
            f"{about['file']}: {about['title']}, layout {self.layout}, as {card['architecture']}"
            + (f", keys without {self.prefix!r}" if self.prefix else ""),
            *(f"  {note}" for note in self.notes),
            *(f"  assumed: {assumption}" for assumption in self.assumed),
            f"  expects: {about['expects']}",
            f"  labels: {about['labels']}",
            *([f"  licence: {about['licence']}"] if about["licence"] else []),
            "",
            str(self.match) + ("; what has no numbers is assumed, see above" if self.assumed else ""),
        ]
        return "\n".join(lines)


def from_spec(spec: str, file: str, fields: Mapping[str, Any]) -> Encoder:
    """Build the encoder that `FILE[:kind][:field=value...]` means; see `foreign_from`."""
    return foreign_from(spec, file, fields).encoder


def foreign_from(spec: str, file: str | Path, fields: Mapping[str, Any]) -> Foreign:
    """Load what `FILE[:kind][:field=value...]` means, its encoder in evaluation mode.

    Args:
        spec: Text of the request, for messages.
        file: Path of the file of weights.
        fields: Fields that follow the file: fields of the encoder's options that the weights leave open
            (strides, `in_channels`, of 2D weights `kind`); `layout`, `prefix`, `network`, `axes`,
            `allow_partial` and `labels_seen` as in `load_foreign`.

    Raises:
        UsageError: There is no such layout or option.
        CheckpointError: The file cannot be read, or holds another network's weights.
    """
    given = {key: fields[key] for key in _OPTIONS if key in fields}
    for key in ("allow_partial", "labels_seen"):
        if key in given and not isinstance(given[key], bool):
            raise UsageError(f"{spec}: {key} is true or false, not {given[key]!r}")
    for key in ("layout", "prefix", "network", "axes"):
        if key in given:
            given[key] = str(given[key])
    options = {key: value for key, value in fields.items() if key not in _OPTIONS}
    return load_foreign(file, options, **given)


def load_foreign(
    path: str | Path,
    options: Mapping[str, Any] | None = None,
    layout: str | None = None,
    prefix: str | None = None,
    network: str | None = None,
    axes: str | None = None,
    allow_partial: bool = False,
    labels_seen: bool | None = None,
) -> Foreign:
    """Build an encoder with the weights of another toolkit's checkpoint.

    Every number of the encoder must come from the file, and the file must have nothing more inside the
    encoder's modules; heads and decoders beside it are left out. Strides, pools and other operators
    without numbers come from what the file says beside its weights, from its name, or are assumed and told
    (`Foreign.assumed`). 2D kernels go as they are into `acs`,
    `2.5d` and `p3d`, and are inflated along the depth (I3D) for `3d`. The first convolution takes another
    number of channels than the file's by the sum of its kernels, shared out: a grey volume gives what the
    same grey picture gave in every channel.

    Args:
        path: File that torch.save wrote (.pth, .pt, .ckpt), or safetensors.
        options: Options of the encoder, above those that the weights decide.
        layout: Name of one of `LAYOUTS`; None to find it.
        prefix: Prefix of the encoder's keys, where the file holds several; None to choose.
        network: Name of a 2D network of torchvision or timm (timm/NAME), for a `converted` encoder of it.
        axes: Order in which the network saw the axes of volumes, where that is known better than here: xyz
            for volumes as NIfTI holds them. 3D kernels are turned to ours, zyx.
        allow_partial: Whether to take what matches, however little.
        labels_seen: Whether the weights learned from labels of volumes, where that is known better than
            here.

    Raises:
        UsageError: There is no such layout, network or option.
        CheckpointError: The file cannot be read, or does not hold such a network.
    """
    if axes is not None and sorted(axes) != sorted(AXES):
        raise UsageError(f"axes {axes!r} is no order of x, y and z, such as xyz")
    file = read_file(path)
    notes: list[str] = []
    if network is None:
        chosen, start, others = _detect(file, layout, prefix)
        if chosen.name == "torchvision" and layout is None:
            network = _variant(file, start)
            notes = [f"{network.rpartition('/')[2]}, as the file says; layout=torchvision reads it as a "
                     "plain ResNet"] if network else []  # fmt: skip
    if network is not None:
        if axes is not None:
            raise UsageError(f"axes {axes}: {network} is a 2D network, whose volumes have no order of axes")
        foreign = _converted(file, network, dict(options or {}), prefix, allow_partial)
        foreign.notes[:0] = notes
    else:
        place = Place(file, start, layout is not None)
        recipe = chosen.recipe(_in_single(_under(file.tensors, start)), place)
        foreign = _built(file, recipe, chosen.name, start, dict(options or {}), axes, allow_partial)
        if others:
            foreign.notes.append(f"also in the file: {', '.join(others)} (prefix=... takes another)")
    if labels_seen is not None:
        foreign.encoder.metadata["labels_seen"] = labels_seen
        foreign.encoder.metadata["foreign"]["labels"] = "as the user says"
    return foreign


def save_foreign(foreign: Foreign, folder: Path) -> Path:
    """Write the encoder of a foreign file as an encoder folder.

    Raises:
        TransientError: The disk is full.
        UsageError: The folder cannot be written.
    """
    own = ("architecture", "config", "sha256")  # `save_encoder` says these itself
    about = {key: value for key, value in foreign.encoder.metadata.items() if key not in own}
    return save_encoder(foreign.encoder, folder, about)


# Which network it is ------------------------------------------------------------------------------


def _variant(file: WeightsFile, prefix: str) -> str | None:
    """Return timm's network that a file of a 2D ResNet names, where it is not the plain one.

    Its weights have the plain one's names, but its strides and pools are others (anti-aliased ones).

    Raises:
        CheckpointError: It is the dilated ResNet of a network for segmentation; or timm is missing.
    """
    beside = prefix.removesuffix("backbone.")
    heads = (f"{beside}classifier.", f"{beside}aux_classifier.")
    if beside != prefix and any(
        key.startswith(heads) and value.ndim == 4 for key, value in file.tensors.items()
    ):
        raise CheckpointError(
            f"{file.path}: the ResNet of a torchvision network for segmentation, whose stages 3 and 4 "
            "dilate as ssl3d's do not; layout=torchvision reads it as one that strides there"
        )
    name = network_name(file)
    if not name or _PLAIN.fullmatch(name):
        return None
    try:
        import timm
    except ImportError as error:
        raise CheckpointError(
            f"{file.path}: says that it is {name}, whose pools or strides are not torchvision's ResNet's: "
            "pip install 'ssl3d[timm]' for timm's; layout=torchvision reads it as a plain ResNet"
        ) from error
    return f"timm/{name}" if timm.is_model(name) else None


def _prefixes(tensors: Mapping[str, Tensor], anchor: str) -> list[str]:
    """Return the prefixes of a key in a file, the likeliest encoder first."""
    prefixes = [key[: -len(anchor)] for key in tensors if key == anchor or key.endswith(f".{anchor}")]
    return sorted(prefixes, key=lambda prefix: (_rank(prefix), prefix.count("."), prefix))


def _rank(prefix: str) -> int:
    words = re.split(r"[._]", prefix)
    return next((n for n, word in enumerate(_TWINS, 1) if word in words), 0)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _in_single(tensors: State) -> State:
    """Return half-precision tensors in float32, in which sums of kernels keep what they sum."""
    halves = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in halves else value for key, value in tensors.items()}


def _detect(file: WeightsFile, layout: str | None, prefix: str | None) -> tuple[Layout, str, list[str]]:
    """Find the layout, the prefix, and prefixes of the same network elsewhere in the file."""
    names = [candidate.name for candidate in LAYOUTS]
    if layout is not None and layout not in names:
        raise UsageError(f"layout {layout!r} is none of {', '.join(names)}")
    for candidate in LAYOUTS:
        if layout not in (None, candidate.name):
            continue
        starts = _prefixes(file.tensors, candidate.anchor)
        fitting = [
            start
            for start in starts
            if layout is not None or candidate.fits(_under(file.tensors, start), Place(file, start))
        ]
        if prefix is not None:
            named = [
                start for start in fitting if start.removesuffix(".").endswith(prefix.removesuffix("."))
            ]
            if fitting and not named:
                there = ", ".join(map(repr, fitting))
                raise CheckpointError(
                    f"{file.path}: no {candidate.name} weights under prefix {prefix!r} (has {there})"
                )
            fitting = named
        if fitting:
            alike = [start for start in fitting[1:] if not start.endswith(f".{fitting[0]}decoder.encoder.")]
            return candidate, fitting[0], [repr(start) for start in alike if not _again(start, fitting[0])]
    first = sorted({key.rpartition(".")[0].partition(".")[0] for key in file.tensors})
    begin = ", ".join(list(file.tensors)[:3])
    known = unreadable(file.tensors)
    contents = (
        f"these are weights of {known}" if known else f"its names begin {begin} ({len(first)} modules)"
    )
    if layout is not None:
        anchor = next(candidate.anchor for candidate in LAYOUTS if candidate.name == layout)
        raise CheckpointError(f"{file.path}: not of layout {layout}, which has {anchor}; {contents}")
    raise CheckpointError(
        f"{file.path}: no network that ssl3d knows ({', '.join(names)}): {contents}; "
        "network=NAME makes an encoder of torchvision's or timm's 2D network of that name"
    )


def _again(prefix: str, taken: str) -> bool:
    """Check whether a prefix is a second name of what was taken: nnU-Net's decoders hold their encoder."""
    return prefix == re.sub(r"encoder\.$", "decoder.encoder.", taken)


# The encoder --------------------------------------------------------------------------------------


def _built(
    file: WeightsFile,
    recipe: Recipe,
    layout: str,
    prefix: str,
    options: dict[str, Any],
    axes: str | None,
    partial: bool,
) -> Foreign:
    kind = plugins.load(plugins.ENCODERS, recipe.architecture)
    where = f"{file.path} as {recipe.architecture}"
    seen = axes or recipe.axes
    if seen != AXES and not recipe.turns:
        raise UsageError(
            f"axes {seen}: {recipe.architecture} goes by the order of its axes: turn the volumes"
        )
    if axes not in (None, AXES) and all(value.ndim < 5 for value in recipe.state.values()):
        raise UsageError(f"axes {axes}: {file.path} holds 2D kernels, which have no such order")
    own_options = _turned_options(kind.Config, recipe.config, seen)
    config = from_dict(kind.Config, {**own_options, **triples(kind.Config, options)}, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder: Encoder = kind(config)
    state, notes = turned(recipe.state, seen, recipe.tables), list(recipe.notes)
    if seen != AXES:
        notes.append(f"kernels turned from the network's axes, {' '.join(seen)}, to z y x")
    own = encoder.state_dict()
    notes += _fit_stem(state, own, recipe.stem)
    notes += _inflate(state, own)
    first = tensor_names(own)
    for key, name in first.items():  # tensors with two names count once
        if key != name and key in state:
            state.setdefault(name, state[key])
            del state[key]
    keys = {key for key in own if first[key] == key and not _of_depth(key, state)}
    try:
        match = load_matching(encoder, state, str(file.path), keys, 0.0 if partial else 1.0)
    except CheckpointError as error:
        raise CheckpointError(f"{error} [layout {layout}, as {recipe.architecture}]") from error
    modules = {key.partition(".")[0] for key in own}
    inside = [key for key in match.unused if key.partition(".")[0] in modules]
    if inside and not partial:
        shown = ", ".join(inside[:3])
        raise CheckpointError(
            f"{file.path}: another network than {recipe.architecture}: {len(inside)} keys more inside its "
            f"modules ({shown}{', ...' if len(inside) > 3 else ''}); --allow-partial (or "
            "allow_partial=true) leaves them out"
        )
    if any(_of_depth(key, state) for key in own):
        notes.append("depth kernels (p3d) are not in the file and begin as the identity")
    settled = {*options, *(["axes"] if axes else [])}
    assumed = [line for line in recipe.assumed if not settled & set(re.findall(r"(\w+)=", line))]
    encoder.metadata = _card(file, recipe, encoder, match, layout, prefix, notes, assumed)
    return Foreign(encoder.eval(), match, layout, prefix, notes, assumed)


def _turned_options(config: type, options: Mapping[str, Any], axes: str) -> dict[str, Any]:
    """Turn options along three axes from a network's order of axes to ours."""
    order = [axes.index(axis) for axis in AXES]
    hints = typing.get_type_hints(config)

    def of(value: Any) -> Any:
        return [value[place] for place in order]

    result = dict(options)
    for key, value in options.items():
        inside = typing.get_args(hints[key])
        if isinstance(value, list | tuple) and value:
            if hints[key] == _TRIPLE or (_TRIPLE in inside and not isinstance(value[0], list | tuple)):
                result[key] = of(value)
            elif _TRIPLE in inside:
                result[key] = [of(triple) for triple in value]
    return result


def _of_depth(key: str, state: Mapping[str, Tensor]) -> bool:
    """Check whether a key is a depth kernel of p3d that 2D weights do not have."""
    return key.endswith("depth_weight") and key not in state


def _fit_stem(state: State, own: Mapping[str, Tensor], stem: str) -> list[str]:
    """Bring the first convolution to the encoder's channels, as `networks.replace_stem` does."""
    if stem not in state or stem not in own or state[stem].ndim < 4:
        return []
    theirs, ours = state[stem].shape[1], own[stem].shape[1]
    if theirs == ours:
        return []
    whole = state[stem].sum(1, keepdim=True) / ours
    state[stem] = whole.expand(-1, ours, *whole.shape[2:]).contiguous()
    shared = f", shared out among {ours}" if ours > 1 else ""
    return [f"{stem}: the kernels of {theirs} channels are added up{shared}, so that grey stays grey"]


def _inflate(state: State, own: Mapping[str, Tensor]) -> list[str]:
    """Repeat 2D kernels along the depth, divided by its length, where the encoder's are 3D."""
    flat = [key for key in own if key in state and own[key].ndim == 5 and state[key].ndim == 4]
    for key in flat:
        depth = own[key].shape[2]
        state[key] = state[key].unsqueeze(2).expand(-1, -1, depth, -1, -1).contiguous() / depth
    if not flat:
        return []
    return [
        f"{len(flat)} 2D kernels inflated along D (I3D): equal slices give what the 2D network gave away "
        "from the first and last"
    ]


def _converted(
    file: WeightsFile, network: str, options: dict[str, Any], prefix: str | None, partial: bool
) -> Foreign:
    """Convert a 2D network of torchvision or timm by `ssl3d.convert.encoder`."""
    from ssl3d.convert import networks
    from ssl3d.convert.config import ConvertedConfig
    from ssl3d.convert.encoder import ConvertedEncoder

    where = f"{file.path} as {network}"
    config = from_dict(ConvertedConfig, {**triples(ConvertedConfig, options), "network": network}, where)
    keys = networks.network_2d(network).state_dict()
    anchors = [key for key in keys if keys[key].ndim == 4][:3]
    starts = [start for anchor in anchors for start in _prefixes(file.tensors, anchor)]
    if prefix is not None:
        starts = [start for start in starts if start.removesuffix(".").endswith(prefix.removesuffix("."))]
    # The prefix with most matching keys; of equals, the likeliest encoder.
    best = max(
        starts or [""],
        key=lambda start: (len(keys.keys() & _under(file.tensors, start).keys()), -_rank(start)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = _under(file.tensors, best)
        encoder = ConvertedEncoder(config, state, str(file.path), 0.0 if partial else 1.0)
    assert encoder.match is not None

    source = Source(
        network, encoder.paper, "as the 2D network was trained", labels="of natural images, perhaps"
    )
    recipe = Recipe("converted", {}, state, source)
    notes: list[str] = []
    encoder.metadata = _card(file, recipe, encoder, encoder.match, network, best, notes, [])
    return Foreign(encoder.eval(), encoder.match, network, best, notes)


def _card(
    file: WeightsFile,
    recipe: Recipe,
    encoder: Encoder,
    match: Match,
    layout: str,
    prefix: str,
    notes: list[str],
    assumed: list[str],
) -> dict[str, Any]:
    source = recipe.source
    return {
        "architecture": recipe.architecture,
        "config": to_dict(encoder.config),
        "foreign": {
            "file": file.path.name,
            "sha256": file.sha256,
            "bytes": file.size,
            "title": source.title,
            "layout": layout,
            "prefix": prefix,
            "matched": match.matched,
            "total": match.total,
            "not_used": sorted({key.partition(".")[0] for key in match.unused}),
            "notes": notes,
            "assumed": assumed,
            "licence": source.licence,
            "expects": source.expects,
            "labels": source.labels,
        },
        "preprocessing": [{"options": source.prepare, "of": source.title}] if source.prepare else [],
        "sha256": state_digest(encoder.state_dict()),
        "steps": 0,  # of ours
        "identities": [],
        "labels_seen": source.labels_seen,
        "citations": {"weights": source.citation or source.title, recipe.architecture: encoder.paper},
    }
