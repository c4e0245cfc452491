"""Graphs that need no code of ours: ONNX, and programs of torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl3d.encoders import to_memory_format
from ssl3d.errors import UsageError
from ssl3d.export.options import ExportOptions
from ssl3d.export.source import Source, largest_difference, require_equal, sample
from ssl3d.model import Portable

ONNX = "model.onnx"
PROGRAM = "model.pt2"
INPUT = "volume"

Run = Callable[[Tensor], Sequence[Tensor]]


def write_onnx(source: Source, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Write `model.onnx` into a folder, checked by onnxruntime.

    Args:
        source: What is exported.
        folder: Folder to write into.
        options: Options of the command, of which `patch` counts.

    Returns:
        Input, outputs, and the largest difference from ssl3d's own outputs.

    Raises:
        UsageError: A package is missing, or the network cannot be written so.
        TrainingError: The outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f'--to onnx: needs {error.name}; pip install "ssl3d[export]"') from error
    portable = _sized(source, options.patch)
    program = traced(source, portable)
    with _quiet(), torch.no_grad():
        try:
            graph = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[INPUT],
                output_names=list(portable.outputs),
            )  # fmt: skip
        except Exception as error:  # its parts raise what they like
            raise UsageError(f"--to onnx: {source.word} cannot be written so ({_short(error)})") from error
        assert graph is not None
        graph.save(folder / ONNX)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / ONNX, settings, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {INPUT: x.numpy()})]

    return _checked(source, portable, run, program, "--to onnx")


def write_program(source: Source, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Write `model.pt2` into a folder, which `torch.export.load` opens without ssl3d.

    Args:
        source: What is exported.
        folder: Folder to write into.
        options: Options of the command, of which `patch` counts.

    Returns:
        Input, outputs, and the largest difference from ssl3d's own outputs.

    Raises:
        UsageError: The network cannot be written so.
        TrainingError: The outputs differ.
    """
    portable = _sized(source, options.patch)
    program = traced(source, portable)
    with _quiet():
        torch.export.save(program, folder / PROGRAM)
        loaded = torch.export.load(folder / PROGRAM)
    module = loaded.module()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        out = module(x)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    return _checked(source, portable, run, loaded, "--to torch-export")


def traced(source: Source, portable: Portable) -> torch.export.ExportedProgram:
    """Trace a network: any number of volumes, and any size where that can be.

    Raises:
        UsageError: The network cannot be traced.
    """
    auto = torch.export.Dim.AUTO
    free = [axis for axis in (2, 3, 4) if portable.size[axis - 2] > 1]  # images stay images
    axes = [{0: auto}] if portable.fixed else [dict.fromkeys((0, *free), auto), {0: auto}]
    x, reason = sample(source.channels, portable.size), ""
    if portable.size[0] == 1:  # with channels last, torch's trace of 2D layers holds for no batch of one
        to_memory_format(portable.network, torch.contiguous_format)
    for dynamic in axes:
        try:
            with _quiet(), torch.no_grad(), _any_batch():
                return torch.export.export(portable.network.eval(), (x,), dynamic_shapes=(dynamic,))
        except Exception as error:  # its parts raise what they like
            reason = _short(error)
    raise UsageError(f"{source.word}: torch.export cannot trace the network ({reason})")


def _any_batch() -> Any:
    """Let the trace hold for a batch of one too: torch takes an axis of 1 for a special case."""
    from torch.fx.experimental import _config

    config: Any = _config
    return config.patch(backed_size_oblivious=True)


def _sized(source: Source, size: tuple[int, int, int] | None) -> Portable:
    portable = source.portable()
    if size is None or size == portable.size:
        return portable
    if portable.fixed:
        own, given = (" x ".join(map(str, sides)) for sides in (portable.size, size))
        raise UsageError(f"--patch {given}: the model predicts windows of {own}, as it was trained")
    return Portable(portable.network, portable.outputs, size, portable.fixed)


def _checked(
    source: Source, portable: Portable, run: Run, program: torch.export.ExportedProgram, label: str
) -> dict[str, Any]:
    """Compare the outputs on volumes of every size that the trace takes, and describe both ends."""
    volume = next(node for node in program.graph.nodes if node.name == _user_input(program))
    shape = [side if isinstance(side, int) else None for side in volume.meta["val"].shape]
    sizes = [portable.size]
    if None in shape[2:]:
        d, h, w = portable.size
        least = [_least(program, side) for side in volume.meta["val"].shape[2:]]
        smaller = (max(d - 3, least[0]), max(h - 5, least[1]), max(w - 1, least[2]))
        sizes.append(smaller)
    worst = 0.0
    outputs: list[list[int]] = []
    for count in (1, 2):
        for size in sizes:
            x = sample(source.channels, size, count, seed=100)
            with torch.no_grad():
                wanted = portable.network(x)
                try:
                    computed = run(x)
                except Exception as error:
                    raise UsageError(f"{label}: the file cannot be run ({_short(error)})") from error
            worst = max(worst, largest_difference(computed, wanted))
            outputs = outputs or [list(out.shape[1:]) for out in computed]
    require_equal(worst, f"{label} of {source.word}")
    return {
        "input": {
            "name": INPUT, "axes": "batch, channel, D, H, W", "type": "float32",
            "shape": [None, *shape[1:]], "checked_sizes": [list(size) for size in sizes],
        },
        "outputs": [
            {"name": name, "shape_at_first_size": [None, *out]}
            for name, out in zip(portable.outputs, outputs, strict=True)
        ],
        "largest_difference": worst,
    }  # fmt: skip


def _user_input(program: torch.export.ExportedProgram) -> Any:
    return program.graph_signature.user_inputs[0]


def _least(program: torch.export.ExportedProgram, side: Any) -> int:
    """Return the least length of an axis for which the trace holds."""
    limits: Mapping[Any, Any] = program.range_constraints
    symbol = getattr(getattr(side, "node", None), "expr", None)
    return int(limits[symbol].lower) if symbol in limits else 1


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters say of their own work from the screen."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
