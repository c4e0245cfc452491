"""Where a 2D network's feature maps are, and what its strides are: found in its graph, not typed in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssl3d.convert.folding import Triple
from ssl3d.errors import UsageError

HEADS = ("classifier", "head", "fc", "aux_classifier")
"""Names of top-level modules that answer the 2D network's question and are never part of a feature map."""
_PROBE = (256, 320)  # multiples of 64, and unequal: what has another shape than (N, C, H, W) shows itself


@dataclass(frozen=True)
class Reduction:
    """A place where the network strides: one layer, or several side by side.

    Attributes:
        before: Total stride of the map that enters.
        after: Total stride of the map that leaves.
        nodes: Strided layers and calls of the graph.
    """

    before: int
    after: int
    nodes: tuple[fx.Node, ...]

    @property
    def factor(self) -> int:
        """Stride of this place alone."""
        return self.after // self.before


@dataclass(frozen=True)
class Maps:
    """Feature maps of a network, shallow to deep.

    Attributes:
        nodes: Nodes that give the maps: the last before each of the network's strides, and the deepest.
        channels: Number of channels of each map.
        reductions: Strides of the network, in order.
        strides: Total stride of each map, in 2D.
    """

    nodes: tuple[fx.Node, ...]
    channels: tuple[int, ...]
    reductions: tuple[Reduction, ...]
    strides: tuple[int, ...]

    def with_strides(self, steps: Sequence[Triple]) -> tuple[Triple, ...]:
        """Return the strides of the maps along D, H, W, where the reductions have these strides."""
        totals = []
        for stride in self.strides:
            total = (1, 1, 1)
            for reduction, step in zip(self.reductions, steps, strict=True):
                if reduction.after <= stride:
                    total = (total[0] * step[0], total[1] * step[1], total[2] * step[2])
            totals.append(total)
        return tuple(totals)


def find_maps(net: nn.Module, graph: fx.Graph, channels: int = 3) -> Maps:
    """Find the last map at each stride, by what a probe of 256 x 320 becomes on its way.

    A map is what enters the outermost module that holds one of the network's strides and no other: as in
    timm's `feature_info`, a block's narrow output and not the wide inside of the next. The deepest is the
    last before space is pooled away.

    Args:
        net: 2D network in the mode in which it was traced; left alone.
        graph: Graph of its forward pass.
        channels: Number of channels that it takes.

    Raises:
        UsageError: It has no maps of which the sizes are the input's over a whole number.
    """
    name = type(net).__name__
    ratios = _ratios(net, graph, channels)
    image = next(node for node in graph.nodes if node.op == "placeholder")
    reductions = _reductions(graph, ratios, name)
    deepest = max((r for node, r in ratios.items() if not _in_head(node)), default=1)
    if deepest == 1:
        raise UsageError(f"{name}: found no feature map of a size that is the image's over a whole number")
    nodes: list[fx.Node] = []
    for reduction in reductions:
        entering = _entering(reduction, reductions, graph, ratios)
        if entering is not None and entering is not image:
            nodes.append(entering)
    last = [node for node, r in ratios.items() if r == deepest and not _in_head(node)][-1]
    nodes.append(last)
    return Maps(
        tuple(nodes),
        tuple(int(node.meta["channels"]) for node in nodes),
        tuple(reductions),
        tuple(ratios[node] for node in nodes),
    )


def cut(graph: fx.Graph, maps: Maps) -> None:
    """Make a graph return the maps and nothing else, and erase what they do not need."""
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (list(maps.nodes),)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("output", "placeholder"):
            graph.erase_node(node)


def prune(net: nn.Module, graphs: Sequence[fx.Graph]) -> None:
    """Remove the modules and parameters of a network that none of its graphs uses."""
    used = {str(n.target) for graph in graphs for n in graph.nodes if n.op in ("call_module", "get_attr")}
    for name, module in list(net.named_modules()):
        if any(name == target or name.startswith(target + ".") for target in used):
            continue  # a layer, or inside one
        prefix = name + "." if name else ""
        for child in [child for child, _ in module.named_children()]:
            path = prefix + child
            if not any(
                target == path or target.startswith(path + ".") or path.startswith(target + ".")
                for target in used
            ):
                delattr(module, child)
        own = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
        for parameter in own:
            if prefix + parameter not in used:
                delattr(module, parameter)


def _ratios(net: nn.Module, graph: fx.Graph, channels: int) -> dict[fx.Node, int]:
    """Measure the stride of every node that is a map."""
    height, width = _PROBE
    modes = [module.training for module in net.modules()]
    shadow = copy.deepcopy(net).to("meta")
    for module, training in zip(shadow.modules(), modes, strict=True):
        module.training = training
    probe = _Shapes(fx.GraphModule(shadow, graph))
    try:
        probe.run(torch.zeros(2, channels, height, width, device="meta"))
    except Exception as error:  # whatever a network raises that wants another input
        reason = " ".join(str(error).partition("While executing")[0].split())[:200]
        raise UsageError(
            f"{type(net).__name__} does not take images (B, {channels}, {height}, {width}): {reason}"
        ) from error
    ratios = {}
    for node in graph.nodes:
        shape = probe.shapes.get(node, ())
        if len(shape) != 4 or not (shape[2] and shape[3]):
            continue
        if height % shape[2] == 0 and width % shape[3] == 0 and height // shape[2] == width // shape[3]:
            ratios[node] = height // shape[2]
            node.meta["channels"] = shape[1]
    return ratios


class _Shapes(fx.Interpreter):
    """Interpreter that runs a graph and keeps the shape of every node's tensor."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep the shape of its tensor."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _reductions(graph: fx.Graph, ratios: dict[fx.Node, int], name: str) -> list[Reduction]:
    nodes: dict[int, list[fx.Node]] = {}
    after: dict[int, set[int]] = {}
    for node in graph.nodes:
        before = max((ratios[source] for source in node.all_input_nodes if source in ratios), default=0)
        if node in ratios and 0 < before < ratios[node] and not _in_head(node):
            nodes.setdefault(before, []).append(node)
            after.setdefault(before, set()).add(ratios[node])
    reached, reductions = 1, []
    for before in sorted(nodes):
        if before != reached or len(after[before]) != 1:
            raise UsageError(f"{name}: its strides do not follow one upon the other, as an encoder's must")
        reached = after[before].pop()
        reductions.append(Reduction(before, reached, tuple(nodes[before])))
    return reductions


def _entering(
    reduction: Reduction, reductions: list[Reduction], graph: fx.Graph, ratios: dict[fx.Node, int]
) -> fx.Node | None:
    """Return the map that enters the outermost module with this stride and no other."""
    others = {
        path for other in reductions if other is not reduction for n in other.nodes for path in _inside(n)
    }
    first = reduction.nodes[0]
    place = next((path for path in _inside(first) if path not in others), None)
    within = {first} if place is None else {node for node in graph.nodes if place in _inside(node)}
    entering = None
    for node in graph.nodes:
        if node in within or ratios.get(node) != reduction.before:
            continue
        if any(user in within for user in node.users):
            entering = node
    return entering


def _inside(node: fx.Node) -> list[str]:
    """Return the names of the modules that a node is in, outermost first."""
    return list(node.meta.get("nn_module_stack") or {})


def _in_head(node: fx.Node) -> bool:
    inside = _inside(node)
    return bool(inside) and inside[0].split(".")[0] in HEADS
