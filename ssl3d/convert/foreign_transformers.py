"""Transformers of MONAI: SwinUNETR's encoder and the vision transformer, and what is known of others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssl3d.convert.foreign_files import said, whole_numbers
from ssl3d.convert.foreign_recipe import Place, Recipe, Source, State, axes_of, blocks
from ssl3d.errors import CheckpointError

SWIN = "layers1.0.blocks.0.attn.relative_position_bias_table"
VIT = "patch_embedding.position_embeddings"
_SWIN_PATCH = "patch_embed.proj.weight"

_SWIN_SOURCE = Source(
    "the encoder of MONAI's SwinUNETR",
    "Tang, Yang, Li et al.: Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image "
    "Analysis. CVPR 2022, arXiv 2111.14791",
)


def is_swin(state: Mapping[str, Tensor], place: Place) -> bool:
    """Tell whether these are the weights of a 3D Swin transformer of MONAI."""
    return axes_of(state, _SWIN_PATCH) == 5


def swin(state: State, place: Place) -> Recipe:
    """Read SwinUNETR's `swinViT`, alone or beside a decoder."""
    if any(re.match(r"layers\d+c\.", key) for key in state):
        raise CheckpointError(
            f"{place}: SwinUNETR of version 2 (use_v2), whose stages have convolutions that ssl3d's swin "
            "lacks"
        )
    counts = blocks(state, r"layers(\d)\.(0)\.blocks\.0\.norm1\.weight$")
    depths = [len({k.split(".")[3] for k in state if k.startswith(f"layers{n}.0.blocks.")}) for n in counts]
    if sorted(counts) != [1, 2, 3, 4]:
        raise CheckpointError(f"{place}: a Swin transformer of {len(counts)} stages; ssl3d's has 4")
    rows, heads = state[SWIN].shape
    notes: tuple[str, ...] = ()
    window = whole_numbers(said(place.file).get("window_size"))
    side = (round(rows ** (1 / 3)) + 1) // 2
    if window is not None and math.prod(2 * n - 1 for n in window) == rows:
        notes = (f"window {' '.join(map(str, window))}, as the file says",)
    elif (2 * side - 1) ** 3 == rows:
        window = [side] * 3
    else:
        raise CheckpointError(
            f"{place}: {rows} rows of position biases are of no cubic window: window=D,H,W has to say which"
        )
    width = state[_SWIN_PATCH].shape[0]
    options: dict[str, Any] = {
        "patch": list(state[_SWIN_PATCH].shape[2:]), "width": width, "depths": depths, "heads": heads,
        "window": window, "merging": "merging",
        "mlp_ratio": _hidden(state, "layers1.0.blocks.0.mlp") / width,
    }  # fmt: skip
    named = {f"swinViT.{_current(key)}": value for key, value in state.items()}
    assumed = (
        "merging as in SwinUNETR's default (merging=mergingv2 says otherwise)",
        "axes as they are, D H W: a network of volumes x y z, as MONAI reads NIfTI, wants them so "
        "(windows and merging go by the order of axes)",
    )
    return Recipe(
        "swin", options, named, _SWIN_SOURCE, notes, assumed, f"swinViT.{_SWIN_PATCH}", turns=False
    )


def _current(key: str) -> str:
    """Rename the perceptrons of the self-supervised weights, which MONAI's loader renames too."""
    return key.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")


def _hidden(state: Mapping[str, Tensor], mlp: str) -> int:
    for name in ("linear1", "fc1"):
        if f"{mlp}.{name}.weight" in state:
            return state[f"{mlp}.{name}.weight"].shape[0]
    return 0


_VIT_SOURCE = Source(
    "MONAI's vision transformer",
    "Cardoso et al.: MONAI: An open-source framework for deep learning in healthcare. arXiv 2211.02701",
)
_OF_BLOCK = {  # of MONAI's blocks: torchvision's names
    "norm1": "ln_1", "norm2": "ln_2", "attn.out_proj": "self_attention.out_proj", "mlp.linear1": "mlp.0",
    "mlp.linear2": "mlp.3",
}  # fmt: skip
_CONVOLVED = "patch_embedding.patch_embeddings.weight"
_LINEAR = "patch_embedding.patch_embeddings.1"


def vit(state: State, place: Place) -> Recipe:
    """Read MONAI's ViT, as BrainIAC has it; of a classifier its class token too."""
    facts = said(place.file)
    layers = len({key.split(".")[1] for key in state if re.match(r"blocks\.\d+\.norm1\.weight$", key)})
    if "blocks.0.attn.qkv.weight" not in state or "norm.weight" not in state:
        raise CheckpointError(f"{place}: a vision transformer of MONAI without blocks.0.attn.qkv or norm")
    width = state[VIT].shape[-1]
    assumed = ["axes as they are, D H W (axes=xyz where the network saw x y z, as MONAI reads NIfTI)"]
    notes: list[str] = []
    kernel = _patches(state, place, assumed)
    count = state[VIT].shape[1]
    sizes = whole_numbers(facts.get("img_size"))
    side = round(count ** (1 / 3))
    if sizes and math.prod(n // p for n, p in zip(sizes, kernel.shape[2:], strict=True)) == count:
        grid = tuple(n // p for n, p in zip(sizes, kernel.shape[2:], strict=True))
        notes.append(f"img_size {' '.join(map(str, sizes))}, as the file says")
    elif side**3 == count:
        grid = (side,) * 3
    else:
        raise CheckpointError(
            f"{place}: {count} position embeddings are of no cubic grid, and the file does not say its "
            "img_size"
        )
    heads = facts.get("num_heads")
    if type(heads) is int and width % heads == 0:
        notes.append(f"{heads} attention heads, as the file says")
    else:
        heads = max(1, width // 64)
        assumed.append(
            f"{heads} attention heads, of {width // heads} numbers each (heads=N says otherwise)"
        )
    token = "cls_token" in state
    options = {
        "patch": list(kernel.shape[2:]), "width": width, "layers": layers, "heads": heads,
        "grid": list(grid), "mlp_ratio": _hidden(state, "blocks.0.mlp") / width, "class_token": token,
        "norm_eps": 1e-5, "maps": min(4, layers),
    }  # fmt: skip
    named: State = {"conv_proj.weight": kernel, "encoder.pos_embedding": state[VIT]}
    named |= {f"encoder.ln.{leaf}": state[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    bias = state.get("patch_embedding.patch_embeddings.bias", state.get(f"{_LINEAR}.bias"))
    if bias is not None:
        named["conv_proj.bias"] = bias
    if token:
        named["encoder.class_token"] = state["cls_token"]
    for key, value in state.items():
        match = re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)$", key)
        if match is None:
            if not key.startswith(("patch_embedding.", "norm.", "cls_token")):
                named[key] = value
        elif match[2] in _OF_BLOCK:
            named[f"encoder.layers.encoder_layer_{match[1]}.{_OF_BLOCK[match[2]]}.{match[3]}"] = value
        elif match[2] == "attn.qkv":
            named[f"encoder.layers.encoder_layer_{match[1]}.self_attention.in_proj_{match[3]}"] = value
        elif not match[2].startswith(("norm_cross_attn", "cross_attn")):  # MONAI makes them and uses none
            named[f"encoder.layers.encoder_layer_{match[1]}.{match[2]}.{match[3]}"] = value
    for n in range(layers):  # without biases of queries, keys and values: zeros
        key = f"encoder.layers.encoder_layer_{n}.self_attention.in_proj_bias"
        named.setdefault(key, value.new_zeros(3 * width))
    return Recipe(
        "vit", options, named, _VIT_SOURCE, tuple(notes), tuple(assumed), "conv_proj.weight",
        tables={"encoder.pos_embedding": grid},
    )  # fmt: skip


def _patches(state: State, place: Place, assumed: list[str]) -> Tensor:
    """Return the kernel (E, C, p, p, p) that embeds patches, of MONAI's convolution or linear layer."""
    if axes_of(state, _CONVOLVED) == 5:
        return state[_CONVOLVED]
    weight = state.get(f"{_LINEAR}.weight")
    if weight is None:
        raise CheckpointError(
            f"{place}: a vision transformer of MONAI in 2D, or without its patches' kernel"
        )
    side = round(weight.shape[1] ** (1 / 3))
    if side**3 != weight.shape[1]:
        raise CheckpointError(
            f"{place}: patches of {weight.shape[1]} numbers are no cubes of one channel, which ssl3d reads"
        )
    assumed.append(f"patches of {side} x {side} x {side} voxels of one channel")
    return weight.unflatten(1, (side,) * 3).unsqueeze(1).contiguous()


# What cannot be read ------------------------------------------------------------------------------


def unreadable(tensors: Mapping[str, Tensor]) -> str:
    """Say whose weights these are, where they are known and ssl3d has no such network; else ""."""
    patch = next((v for k, v in tensors.items() if k.endswith("patch_embed.proj.weight")), None)
    scaled = any(re.search(r"blocks\.[\d.]+\.ls1\.gamma$", key) for key in tensors)
    if any("eva.blocks." in key for key in tensors):
        return (
            "a Primus transformer (nnssl, dynamic-network-architectures): EVA blocks with rotary "
            "positions, which ssl3d's vit has not"
        )
    if patch is not None and patch.ndim == 5 and (scaled or any("mask_token" in key for key in tensors)):
        return (
            "a DINOv2 transformer over 3D patches, as 3DINO's ViT: layer scale and a class token with a "
            "place, which ssl3d's vit has not"
        )
    if any("attnpool." in key for key in tensors):
        return (
            "a ResNet of CLIP: three first convolutions and average pools, which ssl3d's ResNets have not"
        )
    if patch is not None:
        return f"a vision transformer{' in 2D' if patch.ndim == 4 else ''}, and not MONAI's"
    return ""
