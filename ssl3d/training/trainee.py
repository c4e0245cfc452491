"""The network of a run: one encoder, its proxies, and their weighted loss over the groups of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl3d.encoder import Encoder
from ssl3d.encoders.norms import uncounted
from ssl3d.errors import TrainingError
from ssl3d.on_device import sent
from ssl3d.proxy import EmbeddedViews, Proxy, StepOutput
from ssl3d.rng import BatchRng, seed_of
from ssl3d.training.balance import Balance, last_shared
from ssl3d.training.batch import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Sums(NamedTuple):
    """Sums of a forward pass beside the loss, in which every value is weighted by its examples.

    Attributes:
        values: Sum of value times examples, and examples, by name.
        pictures: Function that draws the picture, by proxy.
        losses: Proxy, loss and names of the volumes, for each group.
    """

    values: dict[str, tuple[Tensor, int]]
    pictures: dict[str, Callable[[], Figure]]
    losses: list[tuple[str, Tensor, tuple[str, ...]]]


class Trainee(nn.Module):
    """Encoder and the proxies that train it, as one module.

    Attributes:
        patch: Largest input (D, H, W) in voxels that the encoder was trained on so far.
        outline: Outline of the data that the proxies were sized by, for checkpoints.

    Args:
        encoder: Encoder that the proxies share.
        proxies: Proxies by name.
        weights: Weights of the proxies' losses, by name.
        seed: Seed of the run.
        balance: Module that learns the weights; None where they are fixed.
    """

    def __init__(
        self,
        encoder: Encoder,
        proxies: Mapping[str, Proxy],
        weights: Mapping[str, float],
        seed: int,
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.proxies = nn.ModuleDict(dict(proxies))
        self.weights = dict(weights)
        self.balance = balance
        self.seed = seed
        self.patch = patch = [0, 0, 0]
        self.outline: dict[str, Tensor] = {}

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                patch[:] = [max(a, b) for a, b in zip(patch, inputs[0].shape[-3:], strict=True)]

        encoder.register_forward_pre_hook(note)

    def each(self) -> list[tuple[str, Proxy]]:
        """List the proxies with their names."""
        return [(name, cast(Proxy, proxy)) for name, proxy in self.proxies.items()]

    def forward(self, task: str, given: Any, step: object = 0) -> Any:
        """Compute the loss or embeddings, both here, so that wrappers (DDP, FSDP, precision) see it.

        Args:
            task: Task: "loss" of a list of groups; "loss of parts" of a list of such lists, the parts of a
                batch that are embedded one after the other and compared together; or "embed" of a tensor
                (B, C, D, H, W).
            given: Groups, parts, or the tensor.
            step: Part of the seed of the views; the same step gives the same views.

        Returns:
            Loss and its `Sums`, or embeddings (B, embed_dim).
        """
        if task == "embed":
            first = next(iter(self.each()), None)  # several agree on what the encoder takes
            return self.encoder.embed(given if first is None else first[1].present(given))
        return self._loss([given] if task == "loss" else given, step)

    def _loss(self, batch: Sequence[Sequence[Group]], step: object) -> tuple[Tensor, Sums]:
        groups = [group for part in batch for group in part]
        sums = Sums({}, {}, [])
        losses: dict[str, Tensor] = {}
        for name, proxy in self.each():
            own = [[group for group in part if group.proxy == name] for part in batch]
            count = sum(len(group.rows) for part in own for group in part)
            if not count:
                continue
            parts: list[Tensor] = []
            for output, ran in self._outputs(name, proxy, own, step):
                examples = sum(len(group.rows) for group in ran)
                loss = _checked(name, output).loss.reshape(())
                parts.append(loss * (examples / count))
                detached = loss.detach().float()
                _add(sums.values, f"{name}/loss", detached, examples)
                for key, value in output.metrics.items():
                    _add(sums.values, f"{name}/{key}", value.detach().float().mean(), examples)
                if output.picture is not None:
                    sums.pictures.setdefault(name, output.picture)
                sums.losses.append((name, detached, tuple(v for group in ran for v in group.volumes)))
            losses[name] = torch.stack(parts).sum()
        total = self._together(losses, sums, sum(len(group.rows) for group in groups))
        _add(sums.values, "loss", total.detach().float(), sum(len(group.rows) for group in groups))
        if torch.is_grad_enabled():
            total = total + self._nothing(total)
        return total, sums

    def _together(self, losses: Mapping[str, Tensor], sums: Sums, examples: int) -> Tensor:
        """Sum the losses of the proxies by their weights."""
        if self.balance is None:
            return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        for name, weight in zip(self.balance.names, self.balance.current(), strict=True):
            _add(sums.values, f"{name}/weight", weight.float(), examples)
        learning = self.training and torch.is_grad_enabled()
        total: Tensor = self.balance(losses, last_shared(self.encoder) if learning else None)
        return total

    def _outputs(
        self, name: str, proxy: Proxy, parts: list[list[Group]], step: object
    ) -> list[tuple[StepOutput, list[Group]]]:
        """Run a proxy on its groups, one after the other, or at once where it takes a mixed batch."""
        groups = [group for part in parts for group in part]
        if len(parts) > 1:
            return [(self._compared(name, proxy, [part for part in parts if part], step), groups)]
        rngs = self._rngs(name, groups, step)
        if proxy.mixed:
            return [(proxy([group.tensors for group in groups], rngs), groups)]
        outputs = []
        for group, rng in zip(groups, rngs, strict=True):
            with lone_values(name, len(group.rows), "larger crops, or data of one kind"):
                outputs.append((proxy(group.tensors, rng), [group]))
        return outputs

    def _compared(self, name: str, proxy: Proxy, parts: list[list[Group]], step: object) -> StepOutput:
        """Compare all views of a batch, which is embedded part by part, and again in the backward pass.

        Only one part's activations are in memory at a time: the gradient of the embeddings is known before
        the first part is embedded anew. Gao, Zhang, Han, Callan: Scaling Deep Contrastive Learning Batch
        Size under Memory Limited Setup, RepL4NLP 2021. Batch norm sees each part by itself, once.
        """

        def embed(tensors: list[dict[str, Tensor]], part: list[Group]) -> EmbeddedViews:
            return proxy.embed_views(tensors, self._rngs(name, part, step))

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), uncounted(proxy)

        embedded = [
            checkpoint(
                embed, [group.tensors for group in part], part, use_reentrant=False, context_fn=contexts
            )
            for part in parts
        ]
        rows = {key: torch.cat([each.rows[key] for each in embedded]) for key in embedded[0].rows}
        return proxy.compare(EmbeddedViews(rows, embedded[0].picture))

    def _rngs(self, name: str, groups: list[Group], step: object) -> list[BatchRng]:
        seed = seed_of(self.seed, step, name)
        return [BatchRng(seed, group.rows, group.total, group.tensors["index"].device) for group in groups]

    def _nothing(self, like: Tensor) -> Tensor:
        """Return zero, with a gradient of zero for every parameter.

        Under DDP a branch that this rank's batch did not use must join all the same; without DDP it
        makes the same update, so a run does not depend on the number of ranks.
        """
        first = [p.reshape(-1)[:1].sum() for p in self.parameters() if p.requires_grad and p.numel()]
        return torch.stack([value.to(like.dtype) for value in first]).sum() * 0 if first else like * 0


@contextmanager
def lone_values(who: str, examples: int, remedy: str) -> Iterator[None]:
    """Explain the error of torch's batch norm where a channel has a single number.

    Args:
        who: Name of what trains: a proxy, or a job.
        examples: Number of examples that went through together.
        remedy: Another remedy, beside another norm and more examples.

    Raises:
        TrainingError: Batch norm refused a single number per channel.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            f"{who}: batch norm has one number per channel where {examples} example(s) of one shape come "
            "down to one cell (other shapes go through apart); use an encoder with group norm, a larger "
            f"--batch-size, {remedy}"
        ) from error


def _checked(name: str, output: StepOutput) -> StepOutput:
    """Check what a proxy's `forward` returned.

    Raises:
        TrainingError: It is no `StepOutput` of a scalar loss and scalar metrics; `check_proxy` says more.
    """
    if not isinstance(output, StepOutput):
        kind = type(output).__name__
        raise TrainingError(f"{name}: forward returned a {kind}, not StepOutput(loss, metrics)")
    for key, value in {"the loss": output.loss, **output.metrics}.items():
        if not isinstance(value, Tensor) or (value.numel() != 1 and key == "the loss"):
            given = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TrainingError(f"{name}: {key} that forward returned is {given}, not a scalar tensor")
    return output


def _add(values: dict[str, tuple[Tensor, int]], name: str, value: Tensor, examples: int) -> None:
    before, count = values.get(name, (torch.zeros_like(value), 0))
    values[name] = before + value * examples, count + examples


class Reducer:
    """Reducer of values to means over parts and ranks, whose names may differ between ranks.

    Args:
        world: Number of ranks.
        device: Device of the collective.
    """

    def __init__(self, world: int, device: torch.device) -> None:
        self.world, self.device = world, device
        self.names: list[str] = []

    def mean(
        self, parts: Sequence[Mapping[str, tuple[Tensor, int]]], flag: int = 0
    ) -> tuple[dict[str, float], int]:
        """Reduce values to means by name, and flags to the largest one; every rank calls it.

        That takes one transfer from the device, and one collective (three when a name is new).
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for part in parts:
            for name, (value, count) in part.items():
                sums[name] = sums[name] + value if name in sums else value
                counts[name] = counts.get(name, 0) + count
        new = sorted(set(sums) - set(self.names))
        if self.world == 1:
            self.names += new
            top = self._stacked(sums).tolist()
            counted = [float(counts.get(name, 0)) for name in self.names]
        else:
            top, counted, flag, any_new = self._over_ranks(sums, counts, flag, bool(new))
            if any_new:
                import torch.distributed as distributed

                offered: list[Any] = [None] * self.world
                distributed.all_gather_object(offered, sorted(sums))
                self.names += sorted(set().union(*offered) - set(self.names))
                top, counted, _, _ = self._over_ranks(sums, counts, flag, False)
        return {n: t / c for n, t, c in zip(self.names, top, counted, strict=True) if c}, flag

    def _stacked(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Stack the sums in the order of the names, (N,); 0 of what is not there."""
        zero = torch.zeros((), device=self.device)
        own = [sums.get(name, zero).to(self.device, torch.float32) for name in self.names]
        return torch.stack(own) if own else zero.new_zeros(0)

    def _over_ranks(
        self, sums: Mapping[str, Tensor], counts: Mapping[str, int], flag: int, new: bool
    ) -> tuple[list[float], list[float], int, bool]:
        """Sum by name over the ranks in one collective; find the largest flag, and whether one has news."""
        import torch.distributed as distributed

        known = [float(counts.get(name, 0)) for name in self.names]
        message = sent([*known, float(flag), float(new)], self.device, torch.float32)
        own = torch.cat([self._stacked(sums), message])
        ranks = [torch.empty_like(own) for _ in range(self.world)]
        distributed.all_gather(ranks, own)
        gathered = torch.stack(ranks)
        # The largest flag and news in place of their sums: one transfer from the device for all.
        *summed, largest, any_new = torch.cat([gathered[:, :-2].sum(0), gathered[:, -2:].amax(0)]).tolist()
        names = len(self.names)
        return summed[:names], summed[names:], int(largest), bool(any_new)


def finite(values: Mapping[str, float]) -> bool:
    """Tell whether the loss is a finite number."""
    return math.isfinite(values.get("loss", math.nan))
