"""From the embeddings of a volume's slices to one embedding of the volume: attention along the slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl3d.encoder import Encoder
from ssl3d.encoders.inference import evaluating
from ssl3d.errors import CheckpointError, DataError

AXES = "DHW"
_HIDDEN = 16  # of the bias's layers at least, as released: of a few, chance leaves none that is active
_STAGES = 4  # of an encoder, whose averages are a slice's features


@dataclass
class AggregatorConfig:
    """Options of an aggregator, and the slices that it was trained on.

    Attributes:
        features: Length of a slice's features.
        slice_features: Features of a slice: `last`, the encoder's embedding; or `stages`, see
            `stage_features`.
        width: Length of a token, and of the volume's embedding.
        pooling: Way of bringing slices together: deformable (attention to learned places between slices),
            attention (to every slice), or mean (of the projected slices, no attention).
        layers: Number of layers of attention and feed-forward network.
        heads: Number of heads of the attention; each has its own offsets.
        hidden: Width of the feed-forward network.
        downsample: Number of slices per key and value of the deformable attention.
        offset_scale: Largest offset, in distances between two keys.
        offset_kernel: Number of neighbouring slices that an offset is worked out from, odd.
        position_bias: Whether attention has a bias of the distance from a slice to a key, worked out by a
            small network (`PositionBias`).
        dropout: Dropout rate in training.
        slices: Number of slices of a volume that it was trained on; 0 for any number.
        slab: Number of adjacent slices in a slab.
        axis: Axis that the slices lie across.
        plane: Size of the slices seen in training, in voxels.
    """

    features: int
    width: int = 128
    pooling: Literal["deformable", "attention", "mean"] = "deformable"
    layers: int = 4
    heads: int = 4
    hidden: int = 256
    downsample: int = 2
    offset_scale: float = 2.0
    offset_kernel: int = 5
    position_bias: bool = False
    dropout: float = 0.1
    slices: int = 0
    slab: int = 1
    axis: Literal["D", "H", "W"] = "D"
    plane: tuple[int, int] = (64, 64)
    slice_features: Literal["last", "stages"] = "last"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        for name in ("features", "width", "layers", "heads", "hidden", "downsample", "slab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the {self.heads} heads, not {self.width}")
        if self.offset_kernel < 1 or self.offset_kernel % 2 == 0:
            raise ValueError(f"offset_kernel must be odd, not {self.offset_kernel}")
        if self.offset_scale < 0:
            raise ValueError(f"offset_scale must be 0 or more, not {self.offset_scale:g}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in 0 to below 1, not {self.dropout:g}")
        if self.slices < 0:
            raise ValueError(f"slices must be 0 or more, not {self.slices}")


class Attended(NamedTuple):
    """Places that one layer looked at.

    Attributes:
        places: Places of its N keys along the slices, from 0 to S - 1, (B, H, N).
        offsets: Distances of the keys from their regular places, in slices, (B, H, N).
        attention: Attention of every slice to every key, (B, H, S, N).
        keys: Whether each key is there; False for those of padding, (B, N).
    """

    places: Tensor
    offsets: Tensor
    attention: Tensor
    keys: Tensor


def stage_features(encoder: Encoder, maps: Sequence[Tensor]) -> Tensor:
    """Pool the maps of an encoder's last four stages, and set them side by side with its embedding.

    Each part is a global average scaled to length 1, as in the released code of Nguyen et al. (there 256,
    512, 1024, 2048 and again 2048 features of a ResNet-50: its embedding is the average of its last stage).

    Args:
        encoder: Encoder; one with fewer maps gives those that it has.
        maps: Its feature maps, shallow to deep.

    Returns:
        Features (B, F), F being `stage_width(encoder)`.
    """
    parts = [each.float().mean((2, 3, 4)) for each in maps[-_STAGES:]]
    embedded = encoder.pool(list(maps)).float()
    return torch.cat([F.normalize(part, dim=1) for part in (*parts, embedded)], dim=1)


def stage_width(encoder: Encoder) -> int:
    """Return the length of an encoder's `stage_features`."""
    return sum(encoder.channels[-_STAGES:]) + encoder.embed_dim


class SliceAggregator(nn.Module):
    """Module from the features of slices to a volume's embedding, by deformable attention along the slices.

    After Nguyen et al., Joint Self-Supervised Image-Volume Representation Learning with Intra-Inter
    Contrastive Clustering, AAAI 2023 (arXiv:2212.01893), and the deformable attention of Xia et al.,
    CVPR 2022 (arXiv:2201.00520). Differs from the released code: attention runs over the slices (there
    over the features, by a mix-up of axes); the projection is trained and part of the weights (there it
    stays random and is not saved), after a LayerNorm, since encoders differ in scale; tokens know their
    place along the volume, from 0 at the first slice to 1 at the last one, so that slices in another order
    are another volume; keys lie in the middle of their shares of the slices and stop at both ends (there
    offsets count in keys, and beyond the ends there are zeros); offsets are worked out from an odd number
    of slices around a key (there six); projections are not in groups, one per head.

    It works for any number of slices, 1 included (an image), and in float32 whatever the autocast.

    Args:
        config: Options of the aggregator.

    Attributes:
        embed_dim: Length of a volume's embedding.
    """

    Config: ClassVar[type] = AggregatorConfig

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.width
        # Encoders differ in the scale of their embeddings; the place encoding has one.
        self.project = nn.Sequential(
            nn.LayerNorm(config.features), nn.Linear(config.features, config.width)
        )
        count = 0 if config.pooling == "mean" else config.layers
        self.layers = nn.ModuleList(_Layer(config) for _ in range(count))

    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None, details: list[Attended] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend along the slices, and take the mean.

        Args:
            embeddings: Embeddings of slices in their order, (B, S, F).
            mask: True where there is a slice, (B, S); False is padding, anywhere. None: all are slices.
            details: List to which the places that each layer attended to are appended.

        Returns:
            Tokens (B, S, E), 0 at padding, and embeddings of length 1, (B, E); 0 where nothing was given.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.attend(self.project(embeddings.float()), mask, details)

    def attend(
        self, tokens: Tensor, mask: Tensor | None = None, details: list[Attended] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend as `forward` does, from projected tokens (B, S, E), some of them replaced."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            batch, count, _ = tokens.shape
            if mask is None:
                mask = torch.ones(batch, count, dtype=torch.bool, device=tokens.device)
                order = None
            else:
                # Slices first, padding last: what attends then sees a volume of `lengths` slices.
                order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
                tokens = _take(tokens, order)
                mask = mask.gather(1, order)
            lengths = mask.sum(dim=1)
            valid = mask.unsqueeze(2).to(tokens.dtype)
            if self.layers:
                tokens = tokens + place_encoding(lengths, count, tokens.shape[2])
            for layer in self.layers:
                tokens, attended = layer(tokens * valid, lengths)
                if details is not None:
                    details.append(attended)
            tokens = tokens * valid
            pooled = F.normalize(tokens.sum(dim=1) / lengths.clamp(min=1).unsqueeze(1), dim=1)
            if order is not None:
                tokens = _take(tokens, order.argsort(dim=1))
            return tokens, pooled

    @torch.no_grad()
    def embed_volume(
        self,
        encoder: Encoder,
        volume: Tensor,
        batch: int = 64,
        autocast: torch.dtype | None = None,
    ) -> Tensor:
        """Embed a volume (C, D, H, W), (E,): slices, encoder, aggregator; as it was trained.

        Air before the first slice that shows something, and after the last one, is not looked at, as in
        training: it does not change the embedding. A volume of more slices than `config.slices` is taken
        in several interleaved stacks of about that many evenly spaced slabs, which together show
        everything; their embeddings are averaged. A slice larger than `config.plane` is taken window by
        window. An image (D = 1) is a single slice.

        Args:
            encoder: Encoder that the aggregator was trained with.
            volume: Volume (C, D, H, W) of any size.
            batch: Number of windows per pass through the encoder.
            autocast: Precision of the encoder, such as torch.bfloat16.

        Raises:
            DataError: The volume is thinner than one slab.
        """
        from ssl3d.encoders.inference import embed_slices

        config = self.config
        flat, slab = self.lay_flat(volume), 1 if volume.shape[1] == 1 else config.slab
        embeddings = embed_slices(
            encoder, flat, slab, config.plane, 0.5, batch, autocast, lambda x: self.see(encoder, x)
        )
        embeddings = embeddings.to(next(self.parameters()).device)
        with evaluating(self):
            stacks = interleaved(len(embeddings), config.slices)
            pooled = torch.stack([self(embeddings[list(stack)][None])[1][0] for stack in stacks])
        return F.normalize(pooled.mean(dim=0), dim=0).to(volume.device)

    def see(self, encoder: Encoder, x: Tensor) -> Tensor:
        """Compute the features (B, F) of slabs (B, C, d, h, w) that the encoder gives the aggregator."""
        if self.config.slice_features == "last":
            return encoder.embed(x)
        return stage_features(encoder, encoder(x))

    def lay_flat(self, volume: Tensor) -> Tensor:
        """Lay a volume (C, D, H, W) so that the axis that slices lie across is its depth.

        An image stays as it is. Slices of air at both ends are cut off (see `shown_slices`), down to one
        slab.

        Raises:
            DataError: The volume is thinner than one slab.
        """
        if volume.shape[1] == 1:
            return volume
        slab = self.config.slab
        flat = volume.movedim(AXES.index(self.config.axis) + 1, 1)
        if flat.shape[1] < slab:
            raise DataError(
                f"the aggregator was trained on slabs of {slab} slices along "
                f"{self.config.axis}; the volume has {flat.shape[1]}"
            )
        first, end = shown_slices(flat)
        # As where training reads beyond a volume's end, what a slab lacks is air.
        return with_air(flat[:, first : max(end, first + slab)], slab)


class AggregatedEncoder(Encoder):
    """Encoder whose embedding of a volume is an aggregator's, of the volume's slices.

    Feature maps are the encoder's own, of the volume as a whole.

    Attributes:
        version: Version, raised when the same weights give other embeddings; records and caches hold it.

    Args:
        encoder: Encoder that was trained with the aggregator.
        aggregator: Aggregator that pools its slices.
    """

    paper: ClassVar[str] = ""
    version: ClassVar[int] = 2  # 2: air at the ends of a volume is cut off

    def __init__(self, encoder: Encoder, aggregator: SliceAggregator) -> None:
        super().__init__()
        last = aggregator.config.slice_features == "last"
        given = encoder.embed_dim if last else stage_width(encoder)
        if aggregator.config.features != given:
            raise CheckpointError(
                f"the aggregator takes embeddings of length {aggregator.config.features}, "
                f"the encoder gives {given}"
            )
        self.encoder, self.aggregator = encoder, aggregator
        self.config, self.channels, self.strides = encoder.config, encoder.channels, encoder.strides
        self.embed_dim = aggregator.embed_dim
        self.metadata = getattr(encoder, "metadata", {})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the encoder's feature maps of (B, C, D, H, W)."""
        maps: list[Tensor] = self.encoder(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Embed volumes (B, C, D, H, W), without gradients: (B, width)."""
        return torch.stack([self.aggregator.embed_volume(self.encoder, volume) for volume in x])

    def pooled(self, x: Tensor) -> Tensor:
        """Embed volumes (B, C, D, H, W), with gradients: (B, width).

        Slices are seen whole, and all of a volume's in one stack.
        """
        slabs, mask = self.stacks(x)
        seen = self.aggregator.see(self.encoder, slabs[mask])
        each = seen.new_zeros(*mask.shape, seen.shape[1])
        each[mask] = seen
        embeddings: Tensor = self.aggregator(each, mask)[1]
        return embeddings

    def stacks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Stack what the encoder sees of volumes (B, C, D, H, W).

        Returns:
            Slabs (B, S, C, slab, h, w), S of the volume with the most; and whether each is a volume's own,
            (B, S), or air that fills up.
        """
        slab = 1 if x.shape[2] == 1 else self.aggregator.config.slab
        flat = [self.aggregator.lay_flat(volume) for volume in x]
        counts = torch.tensor([volume.shape[1] // slab for volume in flat], device=x.device)
        most = int(counts.max())
        filled = torch.stack([with_air(volume, most * slab)[:, : most * slab] for volume in flat])
        mask = torch.arange(most, device=x.device) < counts.unsqueeze(1)
        return filled.unflatten(2, (most, slab)).transpose(1, 2), mask


class _Layer(nn.Module):
    """Layer of attention and a feed-forward network, each with a residual, LayerNorm and dropout."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        self.attention = SliceAttention(config)
        self.norm_attention = nn.LayerNorm(config.width)
        self.feed = nn.Sequential(
            nn.Linear(config.width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width)
        )
        self.norm_feed = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Attended]:
        """Transform tokens (B, S, E), slices first, of volumes with so many slices, (B,)."""
        seen, attended = self.attention(tokens, lengths)
        tokens = self.norm_attention(tokens + self.dropout(seen))
        return self.norm_feed(tokens + self.dropout(self.feed(tokens))), attended


class SliceAttention(nn.Module):
    """Multi-head attention whose keys and values lie between slices, at learned places.

    Regular places, one for `downsample` slices, are moved by offsets that a small network works out from
    the queries around them; keys and values are interpolated there, linearly. With `pooling` attention
    there is a key for every slice and no offset: plain multi-head attention.

    Args:
        config: Options of the aggregator.
    """

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        self.heads, width = config.heads, config.width
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.deformable = config.pooling == "deformable"
        self.downsample = config.downsample if self.deformable else 1
        self.scale = config.offset_scale * self.downsample
        if self.deformable:
            each = width // config.heads
            # Taps of a depth-wise convolution along the slices, shared by the heads.
            self.offset_taps = nn.Parameter(torch.empty(each, config.offset_kernel))
            self.offset_bias = nn.Parameter(torch.zeros(each))
            self.offset_out = nn.Parameter(torch.empty(config.heads, each))
            nn.init.uniform_(self.offset_taps, -1, 1)
            self.offset_taps.data.mul_(config.offset_kernel**-0.5)
            # Near zero, so that attention starts as the plain one; not at zero, or the taps would get no
            # gradient.
            nn.init.normal_(self.offset_out, std=0.02)
        self.bias = PositionBias(max(_HIDDEN, width // 4)) if config.position_bias else None

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Attended]:
        """Attend to places along the slices.

        Args:
            tokens: Tokens (B, S, E), slices first, padding after them, 0.
            lengths: Number of slices of each volume, (B,).

        Returns:
            Tokens (B, S, E), and the places that were looked at.
        """
        count = tokens.shape[1]
        query, key, value = (
            to(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for to in (self.to_query, self.to_key, self.to_value)
        )
        places, present = regular_places(lengths, count, self.downsample)
        regular = places.unsqueeze(1).expand(-1, self.heads, -1)
        offsets = torch.zeros_like(regular)
        if self.deformable:
            offsets = self._offsets(query, regular, lengths)
            last = (lengths - 1).clamp(min=0).to(tokens.dtype)[:, None, None]
            moved = (regular + offsets).clamp(min=0).minimum(last)
            weights = interpolation(moved, lengths, count)
            key, value = weights @ key, weights @ value
        else:
            moved = regular
        logits = query @ key.transpose(2, 3) / math.sqrt(key.shape[3])
        if self.bias is not None:
            logits = logits + self.bias(moved, lengths, count)
        # A volume of padding alone has no key: finite values keep the softmax, and its gradient, finite.
        logits = logits.masked_fill(~present[:, None, None, :], torch.finfo(logits.dtype).min)
        attention = logits.softmax(dim=3)
        seen = (attention @ value).transpose(1, 2).flatten(2)
        attended = Attended(moved.detach(), offsets.detach(), attention.detach(), present)
        return self.to_out(seen), attended

    def _offsets(self, query: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
        """Compute how far each key moves, in slices, (B, H, N), from queries (B, H, S, E / H)."""
        count, taps = query.shape[2], self.offset_taps.shape[1]
        # Unfolded by hand: a product is exact on every device and needs no padded convolution. Queries of
        # padding are 0, as what lies beyond the ends is.
        around = F.pad(query, (0, 0, taps // 2, taps // 2)).unfold(2, taps, 1)
        hidden = F.gelu(torch.einsum("bhsek,ek->bhse", around, self.offset_taps) + self.offset_bias)
        at = interpolation(places, lengths, count) @ hidden
        offsets: Tensor = torch.einsum("bhne,he->bhn", at, self.offset_out).tanh() * self.scale
        return offsets


class PositionBias(nn.Module):
    """Continuous bias of attention: a small network of the distance between a query and a key.

    That of Swin V2 (Liu et al., CVPR 2022, arXiv:2111.09883), as the released deformable attention has it:
    places run from -1 at the first slice to 1 at the last one, distances d enter as sign(d) log(1 + |d|),
    two hidden layers with ReLU give one number, by the same network for every head, whose keys lie at
    places of their own.

    Args:
        hidden: Width of the hidden layers.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            # Without a bias: what is added to all keys alike, the softmax takes away again.
            nn.Linear(hidden, 1, bias=False),
        )

    def forward(self, places: Tensor, lengths: Tensor, count: int) -> Tensor:
        """Compute the bias (B, H, S, N) of S slices to keys at places (B, H, N), in slices.

        Args:
            places: Places of the keys, from 0 to length - 1.
            lengths: Number of slices of each volume, (B,).
            count: Number S of slices.
        """
        half = (lengths - 1).clamp(min=1).to(places.dtype)[:, None, None, None] / 2
        slices = torch.arange(count, device=places.device, dtype=places.dtype)
        away = (slices[:, None] - places[:, :, None]) / half
        bias: Tensor = self.layers((away.sign() * away.abs().log1p()).unsqueeze(4)).squeeze(4)
        return bias


def regular_places(lengths: Tensor, count: int, downsample: int) -> tuple[Tensor, Tensor]:
    """Place keys evenly along the slices, each in the middle of its share.

    Args:
        lengths: Number of slices of each volume, (B,).
        count: Number S of slices of the longest volume.
        downsample: Number of slices per key.

    Returns:
        Places (B, N), N = ceil(S / downsample), in 0 to length - 1; and whether each key is there, (B, N).

    Example:
        >>> regular_places(torch.tensor([4]), 4, 2)
        (tensor([[0.5000, 2.5000]]), tensor([[True, True]]))
    """
    most = -(-count // downsample)
    keys = (lengths + downsample - 1).div(downsample, rounding_mode="floor")
    number = torch.arange(most, device=lengths.device)
    present = number < keys.unsqueeze(1)
    share = lengths.float() / keys.clamp(min=1)
    places = (number + 0.5) * share.unsqueeze(1) - 0.5
    last = (lengths - 1).clamp(min=0).float().unsqueeze(1)
    return places.clamp(min=0).minimum(last), present


def interpolation(places: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Make matrices (B, H, N, S) that interpolate linearly between slices at places (B, H, N).

    They are matrices, so that neither the result nor a gradient depends on the order of sums. The gradient
    of a place is the difference of the slices around it, of the next one where it lies on a slice.

    Args:
        places: Places from 0 to length - 1.
        lengths: Number of slices of each volume, (B,).
        count: Number S of slices.

    Example:
        >>> interpolation(torch.tensor([[[0.25]]]), torch.tensor([3]), 3)
        tensor([[[[0.7500, 0.2500, 0.0000]]]])
    """
    last = (lengths - 1).clamp(min=0)[:, None, None]
    low = places.detach().floor().long().clamp(min=0)
    low = torch.minimum(low, (last - 1).clamp(min=0))
    high = torch.minimum(low + 1, last)
    share = (places - low).unsqueeze(3)
    number = torch.arange(count, device=places.device)
    at_low = (number == low.unsqueeze(3)).to(places.dtype)
    at_high = (number == high.unsqueeze(3)).to(places.dtype)
    return at_low * (1 - share) + at_high * share


def place_encoding(lengths: Tensor, count: int, width: int) -> Tensor:
    """Encode where each slice lies, from 0 (first) to 1 (last), in sines and cosines (B, S, width).

    Places are relative to the stack, not in mm: the distances between slices tell volumes apart, and a task
    that asks which volume it is would be solved without looking.
    """
    last = (lengths - 1).clamp(min=1).float().unsqueeze(1)
    place = torch.arange(count, device=lengths.device) / last
    half = width // 2
    # From half a turn along the whole volume to 64 half turns.
    octaves = torch.arange(half, device=lengths.device) * (6 / max(half - 1, 1))
    angle = place.unsqueeze(2) * math.pi * 2**octaves
    return torch.cat([angle.sin(), angle.cos()], dim=2)


def interleaved(count: int, size: int) -> list[range]:
    """Divide `count` slabs among evenly spaced stacks of about `size` slabs each.

    Example:
        >>> interleaved(5, 2)
        [range(0, 5, 3), range(1, 5, 3), range(2, 5, 3)]
    """
    step = max(1, -(-count // size)) if size else 1
    return [range(first, count, step) for first in range(step)]


@torch.no_grad()
def shown_slices(volume: Tensor, share: float = 0.1) -> tuple[int, int]:
    """Find the first slice and the end (exclusive), along D of (C, D, H, W), of what is not air.

    The rule is that of `Volume.foreground_box`, but for its blocks, which are one slice deep here, so
    that slices of air more or less change nothing: foreground is brighter than the darkest voxel by a tenth
    of the way to the brightest, in any channel, and a slice counts that has a block with a `share` of it or
    more. The whole volume where no slice has.
    """
    from ssl3d.data.store.writer import block_size

    low, high = volume.amin((1, 2, 3), keepdim=True), volume.amax((1, 2, 3), keepdim=True)
    foreground = (volume > low + 0.1 * (high - low)).any(0)
    _, *block = block_size((1, *volume.shape[2:]))
    # Blocks at the border count what exists of them.
    shares = F.avg_pool2d(foreground.float().unsqueeze(1), block, ceil_mode=True)
    shown = (shares >= share).flatten(1).any(1).nonzero()
    return (int(shown[0]), int(shown[-1]) + 1) if len(shown) else (0, volume.shape[1])


def with_air(volume: Tensor, depth: int) -> Tensor:
    """Pad (C, D, H, W) with slices of its darkest value after the last one, until there are `depth`."""
    lacking = depth - volume.shape[1]
    if lacking <= 0:
        return volume
    air = volume.amin((1, 2, 3), keepdim=True)
    return torch.cat([volume, air.expand(-1, lacking, *volume.shape[2:])], dim=1)


def attended_offset(details: Sequence[Attended]) -> Tensor:
    """Average the absolute offset of the keys, in slices; 0 without layers."""
    if not details:
        return torch.zeros(())
    total = torch.stack([(d.offsets.abs() * d.keys[:, None]).sum() for d in details]).sum()
    count = sum(d.keys.sum() * d.offsets.shape[1] for d in details)
    return total / torch.as_tensor(count).clamp(min=1)


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    return tokens.gather(1, order.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
