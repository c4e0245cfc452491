"""Files of other people's weights: what is in them, read without running their code."""

from __future__ import annotations

import argparse
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl3d.errors import CheckpointError
from ssl3d.files import check_regular
from ssl3d.json_files import parse_json

_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|queue|callback|rng|loops", re.I)
# What wrappers put between a module's name and its parameters' names: torch.compile, FSDP, checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


@dataclass(frozen=True)
class WeightsFile:
    """Contents of a file of weights.

    Attributes:
        path: Path of the file.
        sha256: SHA-256 of the bytes of the file.
        size: Size of the file in bytes.
        tensors: Tensors by their whole path in the file, as in `state_dict.module.conv1.weight`; what
            wrappers of torch add inside a name is left out, and so is the state of optimizers.
        contents: Contents of the file as they are, with the metadata of safetensors.
    """

    path: Path
    sha256: str
    size: int
    tensors: dict[str, Tensor]
    contents: Mapping[str, Any] = field(repr=False, default_factory=dict)


def read_file(path: str | Path) -> WeightsFile:
    """Read what torch.save wrote, or safetensors, whatever the name says.

    Numbers of numpy and `argparse.Namespace` are read beside tensors and plain values; nothing else is.

    Raises:
        CheckpointError: There is no such file, it is cut short, holds code, a web page, or no weights.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, not a file of weights")
    try:
        check_regular(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            digest = hashlib.file_digest(file, "sha256") if not file.seek(0) else hashlib.sha256()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    check_head(path, head, size)
    contents = _safetensors(path, size) if head[8:9] == b"{" else _torch(path, size)
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path}: holds a {type(contents).__name__}, not a state dict")
    if {"module", "spec", "step"} <= set(contents):
        raise CheckpointError(f"{path}: is a checkpoint of an ssl3d run: name the run's folder instead")
    tensors = dict(_tensors(contents))
    if not tensors:
        held = ", ".join(map(str, list(contents)[:5])) or "nothing"
        raise CheckpointError(f"{path}: holds no tensors ({held})")
    for name, tensor in tensors.items():
        if tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
            kind = "sparse" if tensor.layout != torch.strided else str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{path}: {name} is {kind}; save plain real numbers (float32) instead")
    return WeightsFile(path, digest.hexdigest(), size, tensors, contents)


def check_head(path: Path, head: bytes, size: int) -> None:
    """Refuse a file whose first bytes show that it holds no weights, and say what it is."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise CheckpointError(f"{path}: is empty ({size} bytes)")
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(
            f"{path}: is a web page, not weights ({size} bytes): the download gave the page about the "
            "file; fetch the file itself (a link that says raw, resolve or download)"
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a pointer of Git LFS, not the weights: git lfs pull fetches them"
        )
    if start.startswith((b"\x1f\x8b", b"bzh", b"7z\xbc", b"rar!")):
        raise CheckpointError(f"{path}: is a compressed archive, not weights: unpack it first")


def _safetensors(path: Path, size: int) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        contents: dict[str, Any] = load_file(path)  # in the order of the file, which digests depend on
        with safe_open(path, "pt") as file:
            contents["__metadata__"] = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not safetensors ({size} bytes: {error})") from error
    return contents


def _torch(path: Path, size: int) -> Any:
    plain = [
        np._core.multiarray.scalar,  # type: ignore[attr-defined]
        np.dtype,
        argparse.Namespace,
        *(kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")),
    ]
    try:
        with torch.serialization.safe_globals(plain), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what becomes an error anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, tar: each has its own idea of a damaged file
        reason = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
        if "TorchScript" in reason:
            raise CheckpointError(
                f"{path}: is a TorchScript program, and ssl3d runs no code of files: save its state dict "
                "alone (torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')) if you trust it"
            ) from error
        code = re.search(r"(?:GLOBAL|global|class) ([\w.]*\w)(?: |$)", reason)
        if re.search("Unsupported (?:global|class)|Can only|Trying to", reason, re.I):
            name = f" ({code[1]})" if code else ""
            raise CheckpointError(
                f"{path}: holds Python objects{name} beside tensors, and ssl3d runs no code of files: if "
                "you trust it, save its tensors alone: torch.save(torch.load(FILE, weights_only=False)"
                "['state_dict'], 'weights.pth')"
            ) from error
        raise CheckpointError(
            f"{path}: truncated, or not weights of PyTorch ({size} bytes: {reason[:100]})"
        ) from error


def _tensors(contents: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    for key, value in contents.items():
        name = f"{path}{key}"
        if isinstance(value, Tensor):
            yield current_key(_WRAPPERS.sub("", name)), value
        elif isinstance(value, Mapping) and depth < 5 and not _NOT_WEIGHTS.search(str(key)):
            yield from _tensors(value, f"{name}.", depth + 1)


def current_key(key: str) -> str:
    """Rename a key of torchvision's DenseNets, which were saved with the names of an older version.

    Example:
        >>> current_key("features.denseblock1.denselayer2.norm.1.weight")
        'features.denseblock1.denselayer2.norm1.weight'
    """
    return _OLD_DENSENET.sub(r"\1\2", key)


def plan_of(file: WeightsFile) -> tuple[dict[str, Any] | None, str]:
    """Return what nnssl or nnU-Net says of the network beside its weights, and where it says so.

    nnssl's adaptation plan in the checkpoint, or `adaptation_plan.json` in the file's folder or the one
    above; else the `architecture` of nnU-Net's plans, in the checkpoint or in `plans.json`. Both come out
    as `arch_class_name`, `arch_kwargs` and `transpose_forward`, nnssl's with the whole plan as `plan`.

    Raises:
        CheckpointError: A file of a plan is not JSON.
    """
    plan: Any = file.contents.get("nnssl_adaptation_plan")
    where = "in the checkpoint"
    folders = (file.path.parent, file.path.parent.parent)
    for place in (folder / "adaptation_plan.json" for folder in folders):
        if plan is None and place.is_file():
            plan, where = _json(place), str(place)
    if isinstance(plan, Mapping) and isinstance(plan.get("architecture_plans"), Mapping):
        inner = plan.get("pretrain_plan")
        order = inner.get("transpose_forward") if isinstance(inner, Mapping) else None
        return {**plan["architecture_plans"], "plan": dict(plan), "transpose_forward": order}, where
    start = file.contents.get("init_args")
    start = start if isinstance(start, Mapping) else {}
    plan, where = start.get("plans"), "in the checkpoint"
    for place in (folder / "plans.json" for folder in folders):
        if plan is None and place.is_file():
            plan, where = _json(place), str(place)
    configurations = plan.get("configurations") if isinstance(plan, Mapping) else None
    if not isinstance(configurations, Mapping):
        return None, ""
    chosen = configurations.get(start.get("configuration") or "3d_fullres")
    architecture = chosen.get("architecture") if isinstance(chosen, Mapping) else None
    if not isinstance(architecture, Mapping):
        return None, ""
    return {
        "arch_class_name": architecture.get("network_class_name"),
        "arch_kwargs": architecture.get("arch_kwargs"),
        "transpose_forward": plan.get("transpose_forward"),
    }, where


def said(file: WeightsFile) -> dict[str, Any]:
    """Return what a file says of its network beside the weights, in plain values.

    They stand by the last word of their key. They come from the checkpoint itself (`arch`,
    `hyper_parameters`, `args`, metadata of safetensors), then from a `config.json` in its folder, as timm
    and the Hugging Face hub write it, and from the `configs/` of a MONAI bundle. What comes first counts.

    Raises:
        CheckpointError: One of those files is not JSON.
    """
    facts: dict[str, Any] = {}

    def walk(part: Any, depth: int) -> None:
        if isinstance(part, argparse.Namespace):
            part = vars(part)
        if isinstance(part, list | tuple):
            for item in part:
                if isinstance(item, Mapping):
                    walk(item, depth + 1)
        elif isinstance(part, Mapping) and depth < 8:
            for key, value in part.items():
                if isinstance(value, Mapping | argparse.Namespace):
                    if not _NOT_WEIGHTS.search(str(key)):
                        walk(value, depth + 1)
                elif not isinstance(value, Tensor):
                    facts.setdefault(str(key).rpartition(".")[2], value)
                    walk(value, depth + 1)

    walk(file.contents, 0)
    folder = file.path.parent
    bundled = [*(folder / "configs").glob("*.json"), *(folder.parent / "configs").glob("*.json")]
    for place in (folder / "config.json", *sorted(bundled)):
        if place.is_file():
            walk(_json(place), 0)
    return facts


def whole_numbers(value: Any, count: int = 3) -> list[int] | None:
    """Read so many whole numbers, or one for all, from a value or its text; None where it holds none."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    if type(value) is int:
        return [value] * count
    if isinstance(value, list | tuple) and len(value) == count and all(type(n) is int for n in value):
        return list(value)
    return None


def _json(path: Path) -> Any:
    try:
        check_regular(path)
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not JSON ({error})") from error
