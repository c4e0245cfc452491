"""Our `resenc` encoders for nnU-Net: the checkpoint and the adaptation plan that nnssl writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssl3d.checkpoint.card import versions
from ssl3d.encoder import Encoder
from ssl3d.encoders.resenc import ResEnc
from ssl3d.errors import TrainingError, UsageError
from ssl3d.files import whole_file, write_whole

CHECKPOINT = "checkpoint_final.pth"
PLAN = "adaptation_plan.json"
_PATCH = (160, 160, 160)  # what nnssl recommends downstream


def architecture(encoder: ResEnc) -> dict[str, Any]:
    """Return the options of the `ResidualEncoderUNet` that this encoder is one half of.

    Raises:
        UsageError: nnU-Net has no such network.
    """
    config = encoder.config
    if config.kind != "3d" or config.norm != "instance":
        raise UsageError(
            "nnU-Net's residual encoder has kind 3d and norm instance; this one has kind "
            f"{config.kind} and norm {config.norm}"
        )
    count = config.stages
    blocks = [len(stage["blocks"]) for stage in encoder.stages]  # type: ignore[index]
    return {
        "n_stages": count,
        "features_per_stage": list(encoder.channels),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(triple) for triple in config.kernels or ((3, 3, 3),) * count],
        "strides": [list(triple) for triple in config.strides or ((1, 1, 1), *((2, 2, 2),) * (count - 1))],
        "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": [1] * (count - 1),
        "conv_bias": config.conv_bias,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.modules.activation.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def adaptation_plan(encoder: ResEnc, patch: Sequence[int] = _PATCH) -> dict[str, Any]:
    """Build the plan that nnU-Net's fine-tuning reads beside the weights.

    Args:
        encoder: Encoder with its card as `metadata`.
        patch: Recommended size of training crops downstream, along D, H, W.

    Raises:
        UsageError: nnU-Net has no such network, or the patch cannot be halved as often as it would be.
    """
    kwargs = architecture(encoder)
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
            "arch_class_name": "ResidualEncoderUNet",
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
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }


def export_nnunet(encoder: Encoder, out: str | Path, patch: Sequence[int] = _PATCH) -> Path:
    """Write `checkpoint_final.pth` with the plan inside, and `adaptation_plan.json` beside it.

    nnU-Net's fine-tuning of nnssl's checkpoints reads both; `network_weights` are those of the encoder of
    a `ResidualEncoderUNet`, both names of every tensor, and no decoder.

    Args:
        encoder: Encoder `resenc` of kind 3d with instance norm.
        out: Folder, or the checkpoint's own name, ending in .pth.
        patch: Recommended size of training crops downstream, along D, H, W.

    Returns:
        The checkpoint.

    Raises:
        UsageError: It is another encoder, or nnU-Net has no such network.
        TrainingError: The disk is full or the folder cannot be written.
    """
    if not isinstance(encoder, ResEnc):
        raise UsageError(f"nnU-Net's encoder is a resenc, this one is a {type(encoder).__name__}")
    out = Path(out)
    file = out if out.suffix == ".pth" else out / CHECKPOINT
    plan = adaptation_plan(encoder, patch)
    card: Mapping[str, Any] = getattr(encoder, "metadata", {})
    citations = card.get("citations")
    state = {f"encoder.{key}": value.detach().cpu() for key, value in encoder.state_dict().items()}
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
            torch.save(content, temporary)
        write_whole(file.parent / PLAN, json.dumps(plan, indent=1) + "\n")
    except (OSError, RuntimeError) as error:  # torch's writer has no error number for a full disk
        raise TrainingError(f"{file}: cannot be written ({str(error)[:100]})") from error
    return file
