"""`to_3d`: a 2D network over volumes, by tracing its forward pass."""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssl3d.convert import folding, layers, maps
from ssl3d.convert.config import CONVOLUTIONS
from ssl3d.convert.maps import Maps, find_maps
from ssl3d.convert.report import Entry, Report
from ssl3d.errors import UsageError

_CONVOLUTIONS: dict[str, type[layers.Convolution]] = {
    "acs": layers.ACS, "soft-acs": layers.SoftACS, "i3d": layers.Inflated, "2.5d": layers.Flat,
    "p3d": layers.Pseudo3D,
}  # fmt: skip
_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ConvTranspose2d: layers.Transposed, nn.MaxPool2d: layers.MaxPool, nn.AvgPool2d: layers.AvgPool,
    nn.LPPool2d: layers.LPPool, nn.AdaptiveAvgPool2d: layers.AdaptiveAvgPool,
    nn.AdaptiveMaxPool2d: layers.AdaptiveMaxPool, nn.Upsample: layers.Upsample,
    nn.UpsamplingBilinear2d: layers.Upsample, nn.UpsamplingNearest2d: layers.Upsample,
    nn.GroupNorm: layers.GroupNorm, nn.InstanceNorm2d: layers.InstanceNorm, nn.Dropout2d: layers.Dropout,
}  # fmt: skip
_PADS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
_SAMPLEWISE = ("StochasticDepth", "DropPath")  # torchvision's and timm's
_OF_SPACE = (
    nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold, nn.Fold, nn.FractionalMaxPool2d, nn.MaxUnpool2d,
    nn.LazyConv2d, nn.LazyConvTranspose2d, nn.MultiheadAttention, nn.LocalResponseNorm,
)  # fmt: skip
"""Modules of torch that mix voxels (or, the last, look at neighbours) and have no counterpart here."""

_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.max_pool2d: folding.max_pool, torch.max_pool2d: folding.max_pool, F.avg_pool2d: folding.avg_pool,
    F.lp_pool2d: folding.lp_pool, F.adaptive_avg_pool2d: folding.adaptive_avg_pool,
    F.adaptive_max_pool2d: folding.adaptive_max_pool, F.interpolate: folding.interpolate,
    F.upsample: folding.interpolate, F.pad: folding.pad,
}  # fmt: skip
_REDUCTIONS = {torch.mean: "mean", torch.sum: "sum", torch.amax: "amax"}
_REDUCING_METHODS = ("mean", "sum", "amax")
_UNKNOWN_REDUCTIONS = ("var", "std", "norm", "amin", "median", "matmul", "bmm")
_BINARY = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", operator.sub: "sub", operator.isub: "sub",
    torch.sub: "sub", operator.mul: "mul", operator.imul: "mul", torch.mul: "mul", operator.truediv: "div",
    operator.itruediv: "div", torch.div: "div", torch.maximum: "maximum", torch.minimum: "minimum",
    torch.where: "where",
}  # fmt: skip
_BINARY_METHODS = {name + end: name for name in ("add", "sub", "mul", "div") for end in ("", "_")}
_RESIZING = ("view", "reshape")
_JOINING = {torch.cat: "cat", torch.concat: "cat", torch.stack: "stack"}
_FUNCTIONS_OF_SPACE = {
    F.conv2d, torch.conv2d, F.conv_transpose2d, F.unfold, F.fold, F.pixel_shuffle, F.pixel_unshuffle,
    F.grid_sample, F.affine_grid, F.instance_norm, F.group_norm, F.dropout2d, F.max_unpool2d,
    F.scaled_dot_product_attention, operator.matmul, torch.matmul, torch.bmm, torch.einsum, torch.var,
    torch.std, torch.norm, torch.amin,
}  # fmt: skip


def to_3d(
    module: nn.Module,
    kind: str = "acs",
    *,
    axis: str = "D",
    depth_padding: str = "zeros",
    allow: Collection[str] = (),
) -> nn.Module:
    """Convert a 2D network to 3D: (B, C, H, W) becomes (B, C, D, H, W), in what it takes and returns.

    The network's forward pass is traced (torch.fx), so that pools, interpolation and means that are
    written as function calls are converted like layers. On an input of depth 1, `acs`, `soft-acs`, `2.5d`
    and `p3d` compute what the 2D network computes. Kinds `acs` and `2.5d` have its very state dict.

    Args:
        module: 2D convolutional network, left as it is: torchvision's, timm's, your own.
        kind: Kind of the 3D convolutions: `acs` (a third of the kernels in each plane, arXiv:1911.10477),
            `soft-acs` (all in all planes, with a learned softmax mixture), `i3d` (inflated,
            arXiv:1705.07750), `2.5d` (every slice by itself), `p3d` (2D kernels, then depth kernels that
            begin as the identity, arXiv:1711.10305).
        axis: Axis D, H or W along which `i3d` inflates the kernels.
        depth_padding: Continuation of depth beyond its ends in convolutions: zeros, or replicate.
        allow: Names, as the error gives them, of what has no counterpart and may work slice by slice.

    Returns:
        A module with the network's own parameter names, its forward signature, and `.report`.

    Raises:
        UsageError: The forward pass cannot be traced, or holds what has no counterpart: all of it is
            named.
        ValueError: An argument is unknown.
    """
    if kind not in CONVOLUTIONS:
        raise ValueError(f"kind is {kind!r}; choose {', '.join(CONVOLUTIONS)}")
    if axis not in ("D", "H", "W") or depth_padding not in ("zeros", "replicate"):
        raise ValueError(
            f"axis is D, H or W and depth_padding zeros or replicate, not {axis!r}, {depth_padding!r}"
        )
    swap = _Swap(kind, axis, depth_padding, set(allow), Report(kind))
    swap.report.before = sum(p.numel() for p in module.parameters())
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or type(module) in _SWAPPED:
        return swap.alone(copy.deepcopy(module))
    return swap.network(module)


def feature_network(
    module: nn.Module,
    kind: str,
    *,
    strides: Sequence[folding.Triple] = (),
    axis: str = "D",
    depth_padding: str = "zeros",
    allow: Collection[str] = (),
    channels: int = 3,
) -> tuple[Converted, Maps]:
    """Convert a 2D network to a 3D one that returns its feature maps, shallow to deep, and stops there.

    What comes after the deepest map is taken out, parameters and all. A map of a stride s has ceil(n / s)
    voxels along an axis of n; where sizes are multiples of the stride it is the 2D network's.

    Args:
        module: 2D network, as in `to_3d`.
        kind: Kind of the 3D convolutions, as in `to_3d`.
        strides: Strides along D, H, W of each place where the network strides, in order, in place of its
            own; a pool whose stride becomes 1 is left out. Empty: its own, on all three axes.
        axis: Axis of inflation, as in `to_3d`.
        depth_padding: Continuation of depth, as in `to_3d`.
        allow: Names of what may work slice by slice, as in `to_3d`.
        channels: Number of channels that it takes.

    Returns:
        The network, and where its maps were found.

    Raises:
        UsageError: As `to_3d`; there are no such maps; there are more or fewer strides than given.
    """
    swap = _Swap(kind, axis, depth_padding, set(allow), Report(kind))
    swap.report.before = sum(p.numel() for p in module.parameters())
    swap.maps_of = lambda net, graph: find_maps(net, graph, channels)
    swap.strides = strides
    converted = swap.network(module)
    assert swap.maps is not None
    return converted, swap.maps


class Converted(nn.Module):
    """Converted network with the 2D network's parameter names.

    Attributes:
        report: Report of what became what.
    """

    report: Report

    def __init__(self, net: nn.Module, code: dict[bool, fx.graph.PythonCode], report: Report):
        super().__init__()
        # The network's own tree, so that names and state dicts are its own.
        self.__dict__.update(
            {k: v for k, v in net.__dict__.items() if k.startswith("_") or k == "training"}
        )
        self.report = report
        self._source = {mode: compiled.src for mode, compiled in code.items()}
        self._names = {mode: dict(compiled.globals) for mode, compiled in code.items()}
        self._arguments, self._fixed = list(inspect.signature(net.forward).parameters), _switches(net)
        self._compiled: dict[bool, Callable[..., Any]] = {}
        self._build()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the 2D network returns, with depth: (B, C, D, H, W)."""
        for name, value in zip(self._arguments, args, strict=False):
            if name in self._fixed:
                kwargs[name] = value
        given = [
            value for name, value in zip(self._arguments, args, strict=False) if name not in self._fixed
        ]
        for name, value in self._fixed.items():
            if kwargs.pop(name, value) != value:
                raise ValueError(f"{name} was {value} when the network was converted, and stays so")
        return self._compiled[self.training](self, *given, **kwargs)

    def _build(self) -> None:
        for mode, source in self._source.items():
            names = dict(self._names[mode])
            exec(
                compile(source, f"<converted network, {'training' if mode else 'evaluation'}>", "exec"),
                names,
            )
            self._compiled[mode] = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        """Replace modules by their names and drop compiled functions: what pickle and deepcopy can take."""
        state = self.__dict__.copy()
        state["_compiled"] = {}
        state["_names"] = {
            mode: {
                key: _Named(value.__name__) if isinstance(value, ModuleType) else value
                for key, value in names.items()
            }
            for mode, names in self._names.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state and compile again."""
        super().__setstate__(state)
        self._names = {
            mode: {
                key: value.load() if isinstance(value, _Named) else value for key, value in names.items()
            }
            for mode, names in self._names.items()
        }
        self._build()


class _Named:
    """Stand-in for a Python module, by its name."""

    def __init__(self, name: str):
        self.name = name

    def load(self) -> ModuleType:
        return importlib.import_module(self.name)


class Tracer(fx.Tracer):
    """Tracer that sees into everything but torch's own layers and what follows train and eval by itself."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is one node of the graph."""
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.MaxPool2d | nn.AvgPool2d):
            return True
        if type(m).__name__ in _SAMPLEWISE or hasattr(m, "on_slices") or layers.is_blur(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)


class _Swap:
    """State of one conversion of a network."""

    def __init__(self, kind: str, axis: str, depth_padding: str, allow: set[str], report: Report):
        self.kind, self.axis, self.depth_padding = kind, axis, depth_padding
        self.allow, self.report = allow, report
        self.refused: dict[str, str] = {}
        # Of networks that return their feature maps; see `feature_network`.
        self.maps_of: Callable[[nn.Module, fx.Graph], Maps] | None = None
        self.strides: Sequence[folding.Triple] = ()
        self.maps: Maps | None = None
        self.cells: dict[str, folding.Cells] = {}

    def alone(self, layer: nn.Module) -> nn.Module:
        """Convert a network that is one layer."""
        converted = self._layer("", layer)
        self._check()
        assert converted is not None
        self._count(converted)
        converted.report = self.report  # type: ignore[assignment]
        return converted

    def network(self, module: nn.Module) -> Converted:
        """Convert a network of several layers."""
        net = copy.deepcopy(module)
        graphs = {mode: self._trace(net, mode) for mode in (True, False)}
        if self.maps_of is not None:
            modes = {name: part.training for name, part in net.named_modules()}
            for mode, graph in graphs.items():
                self._cut(net.train(mode), graph)
            for name, part in net.named_modules():
                part.training = modes[name]
            maps.prune(net, list(graphs.values()))
            self.report.before = sum(p.numel() for p in net.parameters())
        used = {
            str(node.target)
            for graph in graphs.values()
            for node in graph.nodes
            if node.op == "call_module"
        }
        swapped: set[str] = set()
        for name, layer in list(net.named_modules()):
            new = self._layer(name, layer) if name in used else None
            if new is not None:
                swapped.add(name)
                parent, _, last = name.rpartition(".")
                setattr(net.get_submodule(parent), last, new.train(layer.training))
        for graph in graphs.values():
            self._rewrite(net, graph, swapped)
        self._check()
        converted = Converted(net, {m: g.python_code("self") for m, g in graphs.items()}, self.report)
        self._try(module, net, graphs[False])
        self._count(converted)
        return converted

    def _try(self, module: nn.Module, net: nn.Module, graph: fx.Graph) -> None:
        """Run the converted graph on the shapes of two volumes, where the 2D network takes such images.

        What cannot be folded, such as a reshape that mixes slices with channels, is found here and named,
        and not by whoever runs the network.
        """
        first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
        if first is None:
            return
        flat, deep = (copy.deepcopy(each).to("meta").eval() for each in (module, net))
        for side in (64, 224, 299):
            image = torch.zeros(2, first.in_channels, side, side, device="meta")
            try:
                expected = flat(image)
            except Exception:  # whatever a network raises that wants another size
                continue
            run = _Run(fx.GraphModule(deep, graph))
            for depth in (5, side):  # some want multiples of their strides, along depth too
                try:
                    output = run.run(image.unsqueeze(2).expand(-1, -1, depth, -1, -1))
                    break
                except Exception as error:  # of what is in the network
                    reason = " ".join(str(error).partition("While executing")[0].split())[:160]
            else:
                raise UsageError(f"to_3d: {type(module).__name__} cannot be folded at {run.at}: {reason}")
            both = isinstance(expected, Tensor) and isinstance(output, Tensor)  # not maps, nor several
            if both and expected.ndim != 4 and output.shape != expected.shape:
                raise UsageError(
                    f"to_3d: {type(module).__name__} cannot be folded: of 2 volumes it would give "
                    f"{tuple(output.shape)}, not {tuple(expected.shape)} as of 2 images"
                )
            return

    def _trace(self, net: nn.Module, training: bool) -> fx.Graph:
        modes = {name: module.training for name, module in net.named_modules()}
        net.train(training)
        try:
            fixed = _switches(net)
            graph = Tracer().trace(net, fixed or None)
            for node in reversed(list(graph.nodes)):
                # Of an argument that is fixed, tracing leaves a check of its value.
                if node.op == "placeholder" and _argument(node) in fixed:
                    for user in list(node.users):
                        for check in list(user.users):
                            graph.erase_node(check)
                        graph.erase_node(user)
                    graph.erase_node(node)
            return graph
        except Exception as error:  # whatever user code raises when it meets a stand-in for a tensor
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"to_3d: the forward pass of {type(net).__name__} cannot be traced by torch.fx: {reason}"
            ) from error
        finally:
            for name, module in net.named_modules():
                module.training = modes[name]

    def _cut(self, net: nn.Module, graph: fx.Graph) -> None:
        """Make a graph return its maps, with the strides that are wanted."""
        assert self.maps_of is not None
        new_maps = self.maps_of(net, graph)
        if self.maps is not None and (new_maps.channels, new_maps.strides) != (
            self.maps.channels, self.maps.strides
        ):  # fmt: skip
            raise UsageError(f"{type(net).__name__}: in training it has other feature maps than afterwards")
        self.maps = new_maps
        if self.strides and len(self.strides) != len(new_maps.reductions):
            places = ", ".join(reduction.nodes[0].name for reduction in new_maps.reductions)
            raise UsageError(
                f"strides: {len(self.strides)} given, but {type(net).__name__} strides in "
                f"{len(new_maps.reductions)} places ({places})"
            )
        for reduction, step in zip(new_maps.reductions, self.strides, strict=False):
            if tuple(step) == (reduction.factor,) * 3:
                continue
            for node in reduction.nodes:
                module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
                pooled = node.target in (F.max_pool2d, torch.max_pool2d, F.avg_pool2d)
                strided = type(module) in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
                blurred = module is not None and layers.is_blur(module)
                if not (pooled or strided or blurred or isinstance(module, nn.Conv2d)):
                    raise UsageError(
                        f"strides: {type(net).__name__} strides by {node.name}, which takes no other stride"
                    )
                key = str(node.target) if module is not None else node.name
                self.cells[key] = folding.Cells((step[0], step[1], step[2]))
        for node in new_maps.nodes:
            # What is returned must not be changed afterwards, as activations in place would.
            for user in node.users:
                module = net.get_submodule(str(user.target)) if user.op == "call_module" else None
                if module is not None and getattr(module, "inplace", False):
                    setattr(module, "inplace", False)  # noqa: B010
                if "inplace" in user.kwargs:
                    user.kwargs = {**user.kwargs, "inplace": False}
        maps.cut(graph, new_maps)

    def _layer(self, name: str, layer: nn.Module) -> nn.Module | None:
        """Return the counterpart of a layer, or None where it needs none or has none."""
        before = type(layer).__name__
        new: nn.Module | None = None
        try:
            if isinstance(layer, nn.Conv2d) and (type(layer) is nn.Conv2d or layers.is_same(layer)):
                options = {"axis": "DHW".index(self.axis)} if self.kind == "i3d" else {}
                new = _CONVOLUTIONS[self.kind].of(layer, self.depth_padding, **options)
            elif type(layer) in _SWAPPED:
                new = layers.remade(_SWAPPED[type(layer)], layer)
            elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) and layers.is_same(layer):
                new = layers.remade(
                    layers.MaxPool if isinstance(layer, nn.MaxPool2d) else layers.AvgPool, layer
                )
                new.like_tensorflow = True  # type: ignore[assignment]
            elif isinstance(layer, _PADS):
                new = layers.Pad(layer)
            elif before in _SAMPLEWISE:
                new = layers.PerSample(layer)
            elif layers.is_blur(layer):
                new = layers.remade(layers.BlurPool, layer)
        except ValueError as error:
            self._refuse(name, f"{before}: {error}")
            return None
        if new is None:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, *_OF_SPACE)):
                self._refuse(name, before)
            elif isinstance(layer, nn.BatchNorm2d):
                own = sum(p.numel() for p in layer.parameters())
                self.report.entries.append(Entry(name, before, "as it is, over depth too", own, own))
            return None
        # Pools that pad as TensorFlow does give ceil(n / stride) by themselves.
        pooled = isinstance(new, layers.MaxPool | layers.AvgPool | layers.BlurPool)
        pools = pooled and not layers.is_same(layer)
        if self.maps_of is not None and (pools or isinstance(new, layers.Convolution)):
            new.cells = self.cells.get(name, folding.Cells())  # type: ignore[assignment]
        own = sum(p.numel() for p in new.parameters())
        extra = getattr(new, "depth_weight", getattr(new, "plane_logits", None))
        kept = own - (extra.numel() if isinstance(extra, Tensor) else 0)
        self.report.entries.append(Entry(name, before, _told(new), own, kept))
        return new

    def _refuse(self, name: str, reason: str) -> None:
        if name in self.allow:
            if (name, reason) not in self.report.slicewise:
                self.report.slicewise.append((name, reason))
        else:
            self.refused[name] = reason

    def _check(self) -> None:
        if self.refused:
            refused = "; ".join(f"{name} ({reason})" for name, reason in self.refused.items())
            names = ", ".join(map(repr, self.refused))
            raise UsageError(
                f"to_3d: no 3D counterpart of {refused}; allow=({names},) lets them work slice by slice"
            )

    def _count(self, converted: nn.Module) -> None:
        self.report.parameters = sum(p.numel() for p in converted.parameters())

    # The forward pass --------------------------------------------------------------------------------

    def _rewrite(self, net: nn.Module, graph: fx.Graph, swapped: set[str]) -> None:
        """Fold the input, pass the batch to layers and functions, and unfold what is returned."""
        inputs = [node for node in graph.nodes if node.op == "placeholder" and not _is_constant(node)]
        if not inputs:
            raise UsageError("to_3d: the network's forward takes no tensor")
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            shape = graph.call_function(getattr, (inputs[0], "shape"))
        with graph.inserting_after(shape):
            batch = graph.call_function(operator.getitem, (shape, 0))
        with graph.inserting_after(batch):
            depth = graph.call_function(operator.getitem, (shape, 2))
        with graph.inserting_after(depth):
            image = graph.call_function(operator.eq, (depth, 1))
        ours = {shape, batch, depth, image}
        at = image
        for node in inputs:
            with graph.inserting_after(at):
                at = graph.call_function(folding.enter, (node,))
            node.replace_all_uses_with(at, delete_user_cb=lambda user, own=at: user not in ours | {own})
            ours.add(at)
        in_plane = {node for node in graph.nodes if _pads_for_slices(node, net)}
        for node in list(graph.nodes):
            if node in ours or node.op == "placeholder":
                continue
            if node.op == "output":
                with graph.inserting_before(node):
                    left = graph.call_function(folding.leave, (node.args[0], batch))
                node.args = (left,)
            elif node.op == "call_module" and str(node.target) in swapped:
                node.args = (*node.args, batch, True if node in in_plane else image)
            elif node.op == "call_function":
                self._function(node, batch, True if node in in_plane else image)
            elif node.op == "call_method":
                self._method(node, batch, image)
        graph.lint()

    def _function(self, node: fx.Node, batch: fx.Node, image: fx.Node | bool) -> None:
        before = node.target
        if before in _FUNCTIONS:
            node.target = _FUNCTIONS[before]
            node.kwargs = {**node.kwargs, "batch": batch, "image": image}
            if self.maps_of is not None and node.target in (folding.max_pool, folding.avg_pool):
                # As plain numbers, which the code of a graph can hold.
                steps = self.cells.get(node.name, folding.Cells()).steps
                node.kwargs = {**node.kwargs, "cells": steps or ()}
            if node.target is folding.interpolate:
                size = node.kwargs.get("size", node.args[1] if len(node.args) > 1 else None)
                node.kwargs = {**node.kwargs, "like": _whose_size(size)}
        elif before in _REDUCTIONS:
            node.target = folding.reduce_space
            node.kwargs = {**node.kwargs, "reduction": _REDUCTIONS[before], "batch": batch, "image": image}
        elif before in _BINARY:
            if sum(isinstance(arg, fx.Node) for arg in node.args) < 2 or _is_number(node):
                return
            node.target = folding.matched
            node.kwargs = {**node.kwargs, "operation": _BINARY[before], "batch": batch}
        elif before in _JOINING:
            node.target = folding.joined
            node.kwargs = {**node.kwargs, "operation": _JOINING[before], "batch": batch}
        elif before is torch.reshape and _is_batch(_sizes(node)[0]):
            node.target, sizes = folding.resized, _sizes(node)
            node.args, node.kwargs = (node.args[0], *sizes[1:]), {"method": "reshape"}
            return
        elif before in _FUNCTIONS_OF_SPACE:
            self._refuse(node.name, getattr(before, "__name__", str(before)))
            return
        else:
            origin = str(getattr(before, "__module__", None) or "torch").partition(".")[0]
            known = isinstance(before, type) or origin in ("torch", "_operator", "builtins", "math")
            if not known:  # wrapped for torch.fx, which does not see into it
                self._refuse(node.name, getattr(before, "__name__", str(before)))
            return
        if before not in _BINARY and before not in _JOINING:
            self._tell(node.name, getattr(before, "__name__", str(before)), node.target.__name__)

    def _method(self, node: fx.Node, batch: fx.Node, image: fx.Node) -> None:
        before = str(node.target)
        if before in _REDUCING_METHODS:
            node.op, node.target = "call_function", folding.reduce_space
            node.args, given = _dims(node.args), dict(node.kwargs)
            node.kwargs = {**given, "reduction": before, "batch": batch, "image": image}
            self._tell(node.name, before, "over depth too, where over height and width")
        elif before in _RESIZING and _is_batch(_sizes(node)[0]):
            node.op, node.target, sizes = "call_function", folding.resized, _sizes(node)
            node.args, node.kwargs = (node.args[0], *sizes[1:]), {"method": before}
        elif before == "expand" and _is_batch(_sizes(node)[0]):
            node.op, node.target, sizes = "call_function", folding.expanded, _sizes(node)
            node.args, node.kwargs = (node.args[0], *sizes), {"batch": batch}
        elif before == "expand_as":
            node.op, node.target, node.kwargs = "call_function", folding.expanded_as, {"batch": batch}
        elif before in _BINARY_METHODS and isinstance(node.args[1], fx.Node):
            node.op, node.target = "call_function", folding.matched
            node.kwargs = {**node.kwargs, "operation": _BINARY_METHODS[before], "batch": batch}
        elif before in _UNKNOWN_REDUCTIONS:
            self._refuse(node.name, f".{before}()")

    def _tell(self, name: str, before: str, after: str) -> None:
        if not any(entry.name == name for entry in self.report.entries):
            self.report.entries.append(Entry(name, before, after))


class _Run(fx.Interpreter):
    """Interpreter that remembers the node at which it is."""

    at = ""

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and remember it."""
        target = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", n.target)
        inside = list(n.meta.get("nn_module_stack") or {})
        self.at = f"{n.name} ({target}{f' in {inside[-1]}' if inside else ''})"
        return super().run_node(n)


def _told(layer: nn.Module) -> str:
    if isinstance(layer, layers.Convolution):
        size = "x".join(map(str, layer.weight.shape[2:]))
        return f"{type(layer).__name__} {size}"
    return type(layer).__name__


def _switches(net: nn.Module) -> dict[str, Any]:
    """Return the defaults of the forward pass's switches, which tracing fixes."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(net.forward).parameters.items()
        if parameter.default is None or isinstance(parameter.default, bool | str)
    }


def _argument(node: fx.Node) -> str:
    name = str(node.target)
    return name[:-2] if name.endswith("_1") else name


def _pads_for_slices(node: fx.Node, net: nn.Module) -> bool:
    """Tell whether a node pads for 2.5D convolutions alone, which need nothing beyond the first slice."""
    module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
    return (
        bool(node.users)
        and (isinstance(module, layers.Pad) or node.target is F.pad)
        and all(
            _pads_for_slices(user, net)
            or (user.op == "call_module" and isinstance(net.get_submodule(str(user.target)), layers.Flat))
            for user in node.users
        )
    )


def _is_constant(node: fx.Node) -> bool:
    """Check whether a placeholder is a number with a default, not a tensor."""
    return bool(node.args)


def _is_number(node: fx.Node) -> bool:
    """Check whether a calculation is of sizes, not of tensors: something it starts from is a shape."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.target is getattr:
        return True
    if node.op != "call_function" or getattr(node.target, "__module__", "") != "_operator":
        return False
    return any(_is_number(arg) for arg in node.args if isinstance(arg, fx.Node))


def _is_batch(size: Any) -> bool:
    """Check whether a size is the first of a tensor's: the number of images, in the 2D network."""
    if not isinstance(size, fx.Node):
        return False
    if size.op == "call_method" and size.target == "size":
        return bool(size.args[1:] == (0,))
    if size.target is not operator.getitem or size.args[1] != 0 or not isinstance(size.args[0], fx.Node):
        return False
    whole = size.args[0]
    if whole.target is getattr:
        return bool(whole.args[1] == "shape")
    return whole.op == "call_method" and whole.target == "size" and len(whole.args) == 1


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes that a reshape or expansion is given, one by one or as a tuple."""
    given = node.args[1:] or tuple(node.kwargs.values())
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = tuple(given[0])
    return tuple(given) or (None,)


def _whose_size(size: Any) -> fx.Node | None:
    """Return the tensor whose height and width a size is, where the forward pass says so."""
    while isinstance(size, list | tuple) and size:
        size = size[0]
    while isinstance(size, fx.Node) and size.op in ("call_function", "call_method"):
        source = size.args[0]
        if (size.target is getattr and size.args[1] == "shape") or (
            size.op == "call_method" and size.target == "size"
        ):
            return source if isinstance(source, fx.Node) else None
        if size.target not in (operator.getitem, int):
            return None
        size = source
    return None


def _dims(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rewrite the arguments of x.mean(2, 3) as those of x.mean((2, 3))."""
    if len(args) > 2 and all(isinstance(arg, int) and not isinstance(arg, bool) for arg in args[1:]):
        return (args[0], tuple(args[1:]))
    return args
