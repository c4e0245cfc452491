"""nnU-Net's encoders, residual and plain: sizes from the weights, strides and axes from the plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssl3d.convert.foreign_files import WeightsFile, plan_of
from ssl3d.convert.foreign_recipe import AXES, Place, Recipe, Source, State, blocks
from ssl3d.errors import CheckpointError

RESENC = "stem.convs.0.conv.weight"
PLAIN = "stages.0.0.convs.0.conv.weight"


def resenc(state: State, place: Place) -> Recipe:
    """Read nnU-Net's residual encoder."""
    where = str(place)
    counts = blocks(state, r"stages\.(\d+)\.blocks\.(\d+)\.conv1\.conv\.weight$")
    if not counts or sorted(counts) != list(range(len(counts))):
        raise CheckpointError(
            f"{where}: a network of nnU-Net with a stem but no residual stages (stages.N.blocks): only its "
            "residual encoders (ResidualEncoderUNet, ResEncL) and plain ones (PlainConvUNet) can be read"
        )
    firsts = [f"stages.{n}.blocks.0.conv1.conv.weight" for n in range(len(counts))]
    if state[firsts[0]].ndim != 5 or any(f"stages.{n}.blocks.0.conv3.conv.weight" in state for n in counts):
        raise CheckpointError(
            f"{where}: a residual encoder of nnU-Net, but in 2D or with bottleneck blocks"
        )
    options = _sizes(state, firsts, where, "resenc")
    if len(state[RESENC]) != options["width"]:
        raise CheckpointError(
            f"{where}: a stem of {len(state[RESENC])} channels before a stage of {options['width']}; "
            "ssl3d's resenc has as many in both"
        )
    options["blocks"] = [counts[n] for n in range(len(counts))]
    options["conv_bias"] = "stem.convs.0.conv.bias" in state
    return _planned("resenc", options, state, place, RESENC)


def plain(state: State, place: Place) -> Recipe:
    """Read the encoder of nnU-Net's PlainConvUNet."""
    where = str(place)
    counts = blocks(state, r"stages\.(\d+)\.0\.convs\.(\d+)\.conv\.weight$")
    pooled = any(".1.convs." in key for key in state)
    if pooled or sorted(counts) != list(range(len(counts))):
        raise CheckpointError(
            f"{where}: a plain encoder of nnU-Net with pools between its stages (stages.N.1.convs): only "
            "those that stride by convolutions can be read, for weights do not say which pool"
        )
    firsts = [f"stages.{n}.0.convs.0.conv.weight" for n in range(len(counts))]
    if state[firsts[0]].ndim != 5:
        raise CheckpointError(f"{where}: a plain encoder of nnU-Net, but in 2D")
    options = _sizes(state, firsts, where, "plain_unet")
    options["convolutions"] = [counts[n] for n in range(len(counts))]
    options["conv_bias"] = "stages.0.0.convs.0.conv.bias" in state
    return _planned("plain_unet", options, state, place, PLAIN)


def _sizes(state: State, firsts: list[str], where: str, name: str) -> dict[str, Any]:
    """Return the options that the first kernels of the stages decide."""
    widths = [len(state[key]) for key in firsts]
    kernels = [list(state[key].shape[2:]) for key in firsts]
    ruled = [min(widths[0] * 2**n, max(widths)) for n in range(len(widths))]
    if widths != ruled:
        raise CheckpointError(
            f"{where}: stages of {', '.join(map(str, widths))} channels; ssl3d's {name} doubles them up to "
            f"a most, which would be {', '.join(map(str, ruled))}"
        )
    options = {"kind": "3d", "stages": len(widths), "width": widths[0], "max_width": max(widths)}
    return options | ({"kernels": kernels} if any(kernel != [3, 3, 3] for kernel in kernels) else {})


def _planned(name: str, options: dict[str, Any], state: State, place: Place, stem: str) -> Recipe:
    """Add strides and axes by the plans that lie beside the weights or in their file."""
    plan, where = plan_of(place.file)
    notes: list[str] = []
    assumed: list[str] = []
    arch = (plan or {}).get("arch_kwargs")
    strides = arch.get("strides") if isinstance(arch, Mapping) else None
    if isinstance(strides, list | tuple) and len(strides) == options["stages"]:
        options["strides"] = [
            [stride] * 3 if isinstance(stride, int) else list(stride) for stride in strides
        ]
        notes.append(f"strides from the plans {where}")
    elif plan is not None and plan.get("arch_class_name") in ("ResEncL", "NoSkipResEncL"):
        notes.append(f"strides of {plan['arch_class_name']}, as the plans {where} say")
    else:
        assumed.append("no plans beside the file: strides of 1, then 2 (strides=... says otherwise)")
    axes = _axes((plan or {}).get("transpose_forward"), str(place))
    if plan is None:
        assumed.append("axes as nnU-Net reads them, D H W (axes=yzx and the like: its transpose_forward)")
    source = _of_plan(plan, place.file, axes)
    return Recipe(name, options, state, source, tuple(notes), tuple(assumed), stem=stem, axes=axes)


def _axes(order: Any, where: str) -> str:
    """Return the axes that the network saw, of the z y x in which nnU-Net reads volumes."""
    if order is None:
        return AXES
    if not isinstance(order, list | tuple) or sorted(map(str, order)) != ["0", "1", "2"]:
        raise CheckpointError(f"{where}: transpose_forward of its plans is {order}, no order of 0, 1 and 2")
    return "".join(AXES[int(place)] for place in order)


def _of_plan(plan: dict[str, Any] | None, file: WeightsFile, axes: str) -> Source:
    whole = (plan or {}).get("plan")
    if not isinstance(whole, Mapping):
        return Source(
            "nnU-Net",
            "Isensee et al.: nnU-Net: a self-configuring method for deep learning-based biomedical image "
            "segmentation. Nature Methods 2021",
            "as its plans say: each data set's target spacing, mean 0 and standard deviation 1",
            {"normalize": "mr"},
            labels_seen=True,
            labels="segmentations of nnU-Net's training data",
        )
    configurations = (whole.get("pretrain_plan") or {}).get("configurations") or {}
    first: Any = next(iter(configurations.values()), {}) if isinstance(configurations, Mapping) else {}
    spacing = first.get("spacing") if isinstance(first, Mapping) else None
    known = isinstance(spacing, list | tuple) and len(spacing) == 3
    if known and spacing:  # the plans give it in the network's order
        spacing = [spacing[axes.index(axis)] for axis in AXES]
    trainer = str(file.contents.get("trainer_name") or "")
    return Source(
        "nnssl" + (f" ({trainer})" if trainer else ""),
        "Wald et al.: An OpenMind for 3D medical vision self-supervised learning. ICCV 2025, "
        "arXiv 2412.17041",
        "MR of mean 0 and standard deviation 1"
        + (f", spacing {' x '.join(f'{float(v):g}' for v in spacing)} mm" if known and spacing else ""),
        {"normalize": "mr", **({"spacing": [float(v) for v in spacing]} if known and spacing else {})},
        labels="none (self-supervised)",
    )
