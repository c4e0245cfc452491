"""Our encoders `resenc` and `plain_unet` for nnU-Net: a checkpoint for its loader and for nnssl's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.checkpoint.card import versions
from ssl3d.checkpoint.snapshot import write_state
from ssl3d.encoder import Encoder
from ssl3d.encoders.plain_unet import PlainUNet
from ssl3d.encoders.resenc import SLOPE, ResEnc
from ssl3d.errors import UsageError, not_written, reason_of
from ssl3d.files import whole_file, write_whole

CHECKPOINT = "checkpoint_final.pth"
PLAN = "adaptation_plan.json"
ARCHITECTURE = "architecture.json"
"""File with the entry `architecture` for the plans of nnU-Net, whose own network may be another."""
PATCH = (160, 160, 160)
"""Crop size that nnssl recommends downstream."""


def architecture(encoder: ResEnc | PlainUNet) -> dict[str, Any]:
    """Return the options of the U-Net of nnU-Net's that this encoder is one half of.

    The decoder has the convolutions of nnU-Net's own plans: one in each stage beside a residual encoder,
    two beside a plain one.

    Raises:
        UsageError: nnU-Net has no such network.
    """
    config = encoder.config
    if config.kind != "3d" or config.norm != "instance":
        raise UsageError(
            "nnU-Net's encoders have kind 3d and norm instance; this one has kind "
            f"{config.kind} and norm {config.norm}"
        )
    count = config.stages
    stages: Any = encoder.stages
    if isinstance(encoder, ResEnc):
        layers = {"n_blocks_per_stage": [len(stage["blocks"]) for stage in stages]}
    else:
        layers = {"n_conv_per_stage": [len(stage[0].convs) for stage in stages]}
    decoded = 1 if isinstance(encoder, ResEnc) else 2
    return {
        "n_stages": count,
        "features_per_stage": list(encoder.channels),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(triple) for triple in config.kernels or ((3, 3, 3),) * count],
        "strides": [list(triple) for triple in config.strides or ((1, 1, 1), *((2, 2, 2),) * (count - 1))],
        **layers,
        "n_conv_per_stage_decoder": [decoded] * (count - 1),
        "conv_bias": config.conv_bias,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.modules.activation.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def adaptation_plan(encoder: ResEnc | PlainUNet, patch: Sequence[int] = PATCH) -> dict[str, Any]:
    """Build the plan that nnU-Net's fine-tuning reads beside the weights.

    Args:
        encoder: Encoder with its card as `metadata`.
        patch: Recommended size of training crops downstream, along D, H, W.

    Raises:
        UsageError: nnU-Net has no such network, or the patch cannot be halved as often as it would be.
    """
    kwargs = architecture(encoder)
    residual = isinstance(encoder, ResEnc)
    stem = "encoder.stem" if residual else "encoder.stages.0"
    first = f"{stem}.convs.0" if residual else f"{stem}.0.convs.0"
    reached = encoder.strides[-1]
    if any(size % step for size, step in zip(patch, reached, strict=True)):
        wanted, steps = (" x ".join(map(str, triple)) for triple in (patch, reached))
        raise UsageError(f"patch {wanted}: nnU-Net needs multiples of the total stride, {steps}")
    card: Mapping[str, Any] = getattr(encoder, "metadata", {})
    spacing = [float(side) for side in card.get("spacing") or (1.0, 1.0, 1.0)]
    seen = [int(side) for side in card.get("patch") or patch]
    data = card.get("data")
    names = data.get("datasets") if isinstance(data, Mapping) else None
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "ssl3d",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso" if spacing == [1.0, 1.0, 1.0] else "median",
        "normalization_schemes": ["ZScoreNormalization"] * encoder.config.in_channels,
        "use_mask_for_norm": [False] * encoder.config.in_channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": resampling | {"is_seg": True, "order": 1},
        "spacing": spacing,
        "patch_size": seen,
    }
    return {
        "architecture_plans": {
            "arch_class_name": "ResidualEncoderUNet" if residual else "PlainConvUNet",
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"],
        },
        "pretrain_plan": {
            "dataset_name": "_".join(map(str, names)) if names else "ssl3d",
            "plans_name": "ssl3d",
            "original_median_spacing_after_transp": spacing,
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {configuration["spacing_style"]: configuration},
            "experiment_planner_used": "ssl3d",
        },
        "pretrain_num_input_channels": encoder.config.in_channels,
        "recommended_downstream_patchsize": [int(size) for size in patch],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": stem,
        "keys_to_in_proj": [f"{first}.conv", f"{first}.all_modules.0"],
        "key_to_lpe": None,
    }


def untrained_decoder(encoder: ResEnc | PlainUNet, seed: int = 0) -> dict[str, Tensor]:
    """Make nnU-Net's decoder round an encoder, but for the segmentation layers.

    The names and shapes are those of `ResidualEncoderUNet` and `PlainConvUNet` in
    dynamic-network-architectures; the weights are new, by nnU-Net's own rule (He et al., leaky ReLU of
    slope 0.01, no biases). No head of ssl3d has this architecture.

    Args:
        encoder: Encoder, in 3D with instance norm.
        seed: Seed of the weights.

    Returns:
        Weights by their names in the whole network, `decoder.*` but for `decoder.encoder.*`.
    """
    options = architecture(encoder)
    widths, kernels, strides = (options[key] for key in ("features_per_stage", "kernel_sizes", "strides"))
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def convolution(name: str, shape: tuple[int, ...], out: int) -> dict[str, Tensor]:
        weight = nn.init.kaiming_normal_(torch.empty(shape), a=SLOPE, generator=random)
        bias = {f"{name}.bias": torch.zeros(out)} if options["conv_bias"] else {}
        return {f"{name}.weight": weight, **bias}

    for n in range(len(widths) - 1):  # from the deepest map up
        below, skip = widths[-1 - n], widths[-2 - n]
        state |= convolution(f"decoder.transpconvs.{n}", (below, skip, *strides[-1 - n]), skip)
        for k in range(options["n_conv_per_stage_decoder"][n]):
            place = f"decoder.stages.{n}.convs.{k}"
            own = convolution("conv", (skip, skip if k else 2 * skip, *kernels[-2 - n]), skip)
            own |= {"norm.weight": torch.ones(skip), "norm.bias": torch.zeros(skip)}
            for name, value in own.items():  # both names of every tensor, as in the encoder
                state[f"{place}.{name}"] = value
                alias = name.replace("conv.", "all_modules.0.").replace("norm.", "all_modules.1.")
                state[f"{place}.{alias}"] = value
    return state


def export_nnunet(encoder: Encoder, out: str | Path, patch: Sequence[int] = PATCH) -> Path:
    """Write `checkpoint_final.pth` with the plan inside, `adaptation_plan.json` and `architecture.json`.

    nnssl's fine-tuning reads the plan. The released nnU-Net's `-pretrained_weights` wants every weight of
    its network but the segmentation layers, by all of their names, so `network_weights` are those of a
    whole `ResidualEncoderUNet` or `PlainConvUNet`: the encoder, again as `decoder.encoder.*`, and an
    untrained decoder.
    `architecture.json` is what its plans must say for that network.

    Args:
        encoder: Encoder `resenc` or `plain_unet` of kind 3d with instance norm.
        out: Folder, or the checkpoint's own name, ending in .pth.
        patch: Recommended size of training crops downstream, along D, H, W.

    Returns:
        The checkpoint.

    Raises:
        UsageError: It is another encoder, or nnU-Net has no such network.
        TransientError: The disk is full.
        UsageError: The folder cannot be written.
    """
    if not isinstance(encoder, ResEnc | PlainUNet):
        raise UsageError(
            f"nnU-Net's encoders are resenc and plain_unet, this one is a {type(encoder).__name__}"
        )
    out = Path(out)
    file = out if out.suffix == ".pth" else out / CHECKPOINT
    plan = adaptation_plan(encoder, patch)
    card: Mapping[str, Any] = getattr(encoder, "metadata", {})
    citations = card.get("citations")
    own = {f"encoder.{key}": value.detach().cpu() for key, value in encoder.state_dict().items()}
    state = {**own, **{f"decoder.{key}": value for key, value in own.items()}, **untrained_decoder(encoder)}
    content = {
        "network_weights": state,
        "nnssl_adaptation_plan": plan,
        "trainer_name": "ssl3d",
        "init_args": {},
        "current_epoch": 0,
        "citations": [str(citation) for citation in citations.values()]
        if isinstance(citations, Mapping)
        else [],
        "ssl3d": {"sha256": card.get("sha256"), "versions": versions()},
    }
    try:
        with whole_file(file) as temporary:
            write_state(content, temporary)
        write_whole(file.parent / PLAN, json.dumps(plan, indent=1) + "\n")
        write_whole(file.parent / ARCHITECTURE, json.dumps(_for_plans(plan), indent=1) + "\n")
    except OSError as error:
        raise not_written(error, f"{file}: cannot be written ({reason_of(error)})") from error
    return file


def _for_plans(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry `architecture` of a configuration in nnU-Net's own plans."""
    network = plan["architecture_plans"]
    place = "dynamic_network_architectures.architectures.unet"
    return {
        "network_class_name": f"{place}.{network['arch_class_name']}",
        "arch_kwargs": network["arch_kwargs"],
        "_kw_requires_import": [*network["arch_kwargs_requiring_import"], "dropout_op"],
    }
