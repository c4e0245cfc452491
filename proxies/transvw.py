"""TransVW: recognise which place of the body a spoilt crop is from, and restore it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl3d.api import (
    BatchRng,
    Corruptions,
    DataError,
    Encoder,
    Proxy,
    RestoreViews,
    StepOutput,
    added_option,
    centres_ignored,
    corrupt,
    corrupt_once,
    decode,
    elastic,
    find_alike,
    foreground_shares,
    mirror_counted,
    restoration_error,
    restoration_picture,
    restoring_decoder,
    travelling,
    word_places,
)

if TYPE_CHECKING:
    from ssl3d.api import Collection, Volume

_TRIES = 32  # words tried for one with something to see


@dataclass
class TransVWConfig(RestoreViews, Corruptions):
    """Options of the TransVW proxy.

    Attributes:
        flip: Probability that input and target are mirrored, along each axis; 0 by default, as left is
            another word than right.
        elastic: Strength of the elastic deformation of what the network sees, within slices, in that of
            the released code; the target is not deformed. 0 is none.
        corruptions: Number of corruptions that a crop gets: one, which is shuffle, curve, one box painted
            or all but one box painted, each as likely, as released; or several, each with a probability
            of its own (shuffle, curve, paint, outside), as in Models Genesis.
        words: Number of visual words, which are the classes.
        alike: Share of the volumes that a word is taken from, which are those that look most like its
            reference.
        exact: Probability that a crop is cut at the very place of its word; other crops are shifted and
            zoomed.
        zoom: Strength z of the zoom of crops that are not exact: factor ~ LogUniform(1/(1 + z), 1 + z); the
            crop is resized.
        shift: Range s of the shift of crops that are not exact: shift ~ U(-s, s) times the distance between
            neighbouring words, along each axis.
        restore_weight: Weight of the restoration's error.
        word_weight: Weight of the words' cross entropy.
        width: Channels of the decoder at half resolution.
        skips: Whether the decoder sees the encoder's shallower maps too, as in a U-Net.
        decoder: Kind of decoder: light; or unet, the head of `ssl3d finetune --task segmentation`, which
            sees its input too, travels with the encoder and can start that head.
        word_seed: Seed of the words: of their places and of the volumes that are their references.
    """

    flip: float = 0.0
    elastic: float = added_option(1.0, before=0.0)
    corruptions: Literal["one", "several"] = added_option("one", before="several")
    words: int = 44
    alike: float = 0.5
    exact: float = 1 / 3
    zoom: float = 0.25
    shift: float = 0.25
    restore_weight: float = 1.0
    word_weight: float = 0.01
    width: int = 32
    skips: bool = True
    decoder: Literal["light", "unet"] = "light"
    word_seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        RestoreViews.__post_init__(self)
        Corruptions.__post_init__(self)
        for name in ("words", "width"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, not {getattr(self, name)}")
        if not 0 < self.alike <= 1:
            raise ValueError(f"alike is a share, above 0 and up to 1, not {self.alike:g}")
        if not 0 <= self.exact <= 1:
            raise ValueError(f"exact is a share, 0 to 1, not {self.exact:g}")
        for name in ("elastic", "zoom", "shift", "restore_weight", "word_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name):g}")
        if not self.restore_weight and not self.word_weight:
            raise ValueError("restore_weight and word_weight are both 0: nothing is learned")
        for name in ("shuffle", "curve", "paint", "outside") if self.corruptions == "one" else ():
            if getattr(self, name) != getattr(Corruptions, name):
                raise ValueError(
                    f"{name} is {getattr(self, name):g}, but with corruptions one a crop gets one of four "
                    "ways: leave it out, or take corruptions several"
                )


class _Volumes:
    """Training volumes until the words are found; a copy of the proxy shares them."""

    def __init__(self, volumes: list[Volume]) -> None:
        self.volumes = volumes

    def __deepcopy__(self, memo: dict[int, Any]) -> _Volumes:
        return self


class TransVW(Proxy):
    """The network must work out which place of the body a spoilt crop is from, and what it looked like.

    Haghighi, Hosseinzadeh Taher, Zhou, Gotway, Liang: Transferable Visual Words: Exploiting the Semantics
    of Anatomical Patterns for Self-supervised Learning, IEEE TMI 40(10), 2021 (arXiv:2102.10680).

    A visual word is a place relative to the body's box, in the volumes that look most like a reference
    volume drawn for it. Crops of words, at several scales, are deformed elastically and corrupted in one of
    the four ways of Models Genesis; a decoder restores them, a linear classifier names the word. Before
    the first step every volume is read once, to compare thumbnails; the words are kept in the checkpoint.

    Differs from the paper and its released code: volumes are compared by the principal components of
    thumbnails (a linear auto-encoder in closed form) instead of a trained auto-encoder's latent, so that no
    network has to be trained first; places are relative to the foreground's box instead of absolute,
    because scans begin anywhere, evenly spread instead of random, so that no two words are one, and passed
    over in volumes where they show too little foreground; a word is taken from a share of the volumes
    instead of from 200, for data of any size; crops of the other volumes are restored too, but have no
    class (see `coverage`); words lie anywhere in the body, where those of the released code hold 15 % of
    soft tissue at most, so that they are of the lungs; crops are drawn anew in each step, where there three
    of each are cut beforehand; zoom and shift are along all axes, there within slices alone, and the shift
    is relative to the distance of words, there 10 voxels at most. The released elastic deformation and
    boxes scale with the crop; of a crop that is shuffled most blocks are, as in Models Genesis, where there
    only five small ones are, a thousandth of the voxels, which is next to nothing to restore; errors and
    intensities are as in `models_genesis`. Any encoder has a light decoder and a linear classifier on its
    mean features, in place of a 3D U-Net and a classifier with a convolution of its own; AdamW in place of
    Adam, and few steps. Crops are 32³ instead of 64 x 64 x 32. As released, nothing is mirrored.

    Volumes must lie alike: all prepared in one orientation, showing about the same part of the body.
    """

    Config = TransVWConfig
    paper: ClassVar[str] = (
        "Haghighi, Hosseinzadeh Taher, Zhou, Gotway, Liang: Transferable Visual Words: Exploiting the "
        "Semantics of Anatomical Patterns for Self-supervised Learning, IEEE TMI 40(10), 2021"
    )
    main: ClassVar[str] = "word_accuracy"
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 16, "lr": 1e-3}

    codes: Tensor
    member: Tensor
    references: Tensor
    places: Tensor

    def __init__(self, config: TransVWConfig, encoder: Encoder) -> None:
        """Add the decoder and the classifier."""
        super().__init__(config, encoder)
        self.decoder = restoring_decoder(config.decoder, encoder, config.width, config.skips)
        self.classifier = nn.Linear(encoder.embed_dim, config.words)
        self.register_buffer(
            "places", torch.from_numpy(word_places(config.words, config.word_seed)).float()
        )
        self.register_buffer("references", torch.full((config.words,), -1))
        self._resize([])
        self._data: _Volumes | None = None

    def setup(self, data: Collection) -> None:
        """Make room for the words of these volumes.

        Raises:
            DataError: There are only images, or a single subject.
        """
        volumes = [volume for volume in data if volume.shape[1] > 1]
        subjects = {(volume.dataset, volume.subject) for volume in volumes}
        if len(subjects) < 2:
            raise DataError(
                f"transvw: words are places that several people share, and the data have volumes of "
                f"{len(subjects)} subject{'' if len(subjects) == 1 else 's'} (images, of depth 1, do not "
                f"count); at least 2 are needed"
            )
        volumes.sort(key=lambda volume: volume.index)
        self._data = _Volumes(volumes)
        self._resize([volume.index for volume in volumes])

    def _resize(self, codes: list[int]) -> None:
        device = self.places.device
        self.register_buffer("codes", torch.tensor(codes, dtype=torch.int64, device=device))
        self.register_buffer(
            "member", torch.zeros(len(codes), self.config.words, dtype=torch.bool, device=device)
        )

    def start_epoch(self, epoch: int, loader: Any) -> None:
        """Find the words, once: which volumes look like which reference."""
        if self._data is None or bool(self.member.any()):
            return
        config, volumes = self.config, self._data.volumes
        device = self.codes.device
        likeness = find_alike(volumes, config.words, config.alike, config.word_seed, device=device)
        self.member.copy_(likeness.alike)
        self.references.copy_(self.codes[likeness.references.to(device)])
        self._data = None

    @classmethod
    def draw(cls, config: TransVWConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the crop of a random word, `crop` (C, d, h, w), and the number of the word, `word`.

        Raises:
            DataError: It is an image, has no foreground, or is so small that all words coincide.
        """
        if volume.shape[1] == 1:
            raise DataError(f"{volume.id}: is an image, and visual words are places in volumes")
        for _ in range(_TRIES):
            word = int(rng.integers(config.words))
            start, size = _cut(config, volume, word, rng)
            ignored = bool(centres_ignored(volume, np.array([start]), size)[0])
            enough = foreground_shares(volume, np.array([start]), size)[0] >= config.min_foreground
            if enough and not ignored:
                break
        if ignored:
            raise DataError(f"{volume.id}: {_TRIES} words have a voxel to be ignored at their centre")
        crop = _resized(volume.read(start, size), config.crop)
        drawn = {"crop": crop, "word": torch.tensor(word)}
        if volume.may_ignore:  # a voxel between ignored and counted ones is made of both
            drawn["ignored"] = _resized(volume.read_ignored(start, size)[None].float(), config.crop)[0] > 0
        return drawn

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Corrupt the crops, restore them, and name their words."""
        config, word = self.config, batch["word"]
        everywhere = torch.ones_like(batch["crop"][:, 0], dtype=torch.bool)
        views: dict[str, Tensor] = {"crop": batch["crop"], "foreground": everywhere}
        if "ignored" in batch:
            views["ignored"] = batch["ignored"]
        original, _, counted = mirror_counted(config, views, rng, self.training)
        corrupted = self.corrupted(original, rng)
        maps = self.encoder(corrupted)
        restored = decode(self.decoder, corrupted, maps)
        embedding = self.encoder.pool(maps)
        counts = self.counts(batch["index"], word)
        error = restoration_error(restored, corrupted, original, counted)
        with torch.autocast(embedding.device.type, enabled=False):
            logits = self.classifier(embedding.float())
            # A mean over all examples, whatever their number that counts: equal over any number of ranks.
            word_loss = (functional.cross_entropy(logits, word, reduction="none") * counts).mean()
        metrics = {
            "word_accuracy": (logits.argmax(1) == word).float().mean(),
            "chance": torch.full_like(error.loss.detach(), 1 / config.words),
            "coverage": (counts > 0).float().mean(),
            "word_loss": word_loss.detach(),
            "relative_error": error.relative,
            "flat_error": error.flat,
        }
        # The middle slices: what boxes leave of an example lies there rather than at its ends.
        shown = [x[:, :, x.shape[2] // 2, None] for x in (original, corrupted, restored)]
        return StepOutput(
            config.restore_weight * error.loss + config.word_weight * word_loss,
            metrics,
            lambda: restoration_picture(*shown),
        )

    def travels(self) -> dict[str, nn.Module]:
        """Send the decoder along with the encoder, where it can start a segmentation head."""
        return travelling(self.decoder)

    def corrupted(self, original: Tensor, rng: BatchRng) -> Tensor:
        """Deform and corrupt crops (B, C, D, H, W), which stay as they are."""
        config = self.config
        deformed = elastic(original, rng, config.elastic)
        if config.corruptions == "one":
            return corrupt_once(deformed, rng, config.shuffled).input
        return corrupt(config, deformed, rng).input

    def counts(self, index: Tensor, word: Tensor) -> Tensor:
        """Weigh each example as one of its word: 0 in volumes that are unlike its reference.

        The others make up for it, so that the mean is 1. All words count in volumes of people that were
        kept out, of whom no one knows whom they look like.
        """
        if not len(self.codes):
            return torch.ones_like(index, dtype=torch.float32)
        row = torch.searchsorted(self.codes, index).clamp_max(len(self.codes) - 1)
        known = self.codes[row] == index
        share = self.member.float().mean().clamp_min(1e-9)
        return torch.where(known, self.member[row, word] / share, torch.ones_like(share))


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate (C, d, h, w) to a size, if it has another."""
    if tuple(x.shape[1:]) == tuple(size):
        return x
    return functional.interpolate(x[None], size=tuple(size), mode="trilinear")[0]


def _cut(
    config: TransVWConfig, volume: Volume, word: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Place the crop of a word in a volume: its start and size, in voxels."""
    place = word_places(config.words, config.word_seed)[word]
    low, high = volume.foreground_box()
    move = rng.uniform(-1, 1, 3) * config.shift / config.words ** (1 / 3)
    factor = (1 + config.zoom) ** rng.uniform(-1, 1)
    if rng.uniform() < config.exact:
        move, factor = move * 0, 1.0
    start, size, rooms = [], [], []
    for axis, (side, limit) in enumerate(zip(config.crop, volume.shape[1:], strict=True)):
        first, room = _room(low[axis], high[axis], side, limit)
        extent = min(max(round(side * factor), 1), max(limit, side))
        begin = first + (place[axis] + move[axis]) * room + (side - extent) / 2
        # Padding would give away that the place lies at the border: only what is there is shown.
        lowest, highest = min(0, (limit - extent) // 2), max((limit - extent) // 2, limit - extent)
        start.append(min(max(round(begin), lowest), highest))
        size.append(extent)
        rooms.append(room)
    if not any(rooms):
        raise DataError(
            f"{volume.id}: {volume.shape[1:]} voxels leave a crop of {tuple(config.crop)} a single place, "
            f"so all words are one: take smaller crops (--transvw.crop)"
        )
    return start, size


def _room(low: int, high: int, side: int, limit: int) -> tuple[int, int]:
    """Return the first start along an axis, and the number of further ones, within the foreground's box."""
    if side >= limit:
        return (limit - side) // 2, 0
    if side > high - low:  # as much of the volume around it as it takes
        return min(max((low + high - side) // 2, 0), limit - side), 0
    return low, high - low - side
