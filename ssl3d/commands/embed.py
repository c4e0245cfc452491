"""`ssl3d embed`: embeddings of volumes in one HDF5 file, by a frozen encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssl3d.amounts import count_of
from ssl3d.errors import DataError, UsageError
from ssl3d.files import whole_file

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.data.store.collection import Collection
    from ssl3d.encoder import Encoder

summary = "embed volumes with a frozen encoder, into an HDF5 file"

FALLBACK_PATCH = (64, 64, 64)
"""Window (D, H, W) of an encoder that was never trained."""


@dataclass
class EmbedOptions:
    """Turn volumes into embeddings with a frozen encoder.

    Attributes:
        encoder: Run, its encoder/, or an untrained encoder as scratch:resnet18[:acs].
        data: Stores, folders of stores, phantoms[:N], or anything that `ssl3d prepare` takes, which is
            prepared once and kept in $SSL3D_CACHE, else ~/.cache/ssl3d.
        out: HDF5 file to write.
        pool: Pooling of a volume into one embedding: the mean over its feature maps, or the aggregator over
            its slices that intra_inter trained with the encoder.
        patch: Window D H W in voxels; left out, it is the crop that the encoder was trained on.
        overlap: Share of a window that the next one covers too.
        batch_size: Windows per forward pass.
        dense: Whether to write feature maps too, under dense/<number>, in half precision.
        dense_levels: Levels of the feature maps to write, -1 being the deepest.
        dense_every: Distance D H W in voxels between the places of the feature maps that are written.
        precision: Floating-point precision: 32, or bf16 where the device is fast at it.
        device: Kind of device that computes: auto, cpu, cuda or mps.
        overwrite: Permission to replace the file.
    """

    encoder: str = field(metadata={"positional": True})
    data: tuple[str, ...] = ("phantoms",)
    out: Path = Path("features.h5")
    pool: Literal["mean", "aggregator"] = "mean"
    patch: tuple[int, int, int] | None = None
    overlap: float = 0.5
    batch_size: int = 4
    dense: bool = False
    dense_levels: tuple[int, ...] = (-1,)
    dense_every: tuple[int, int, int] = (4, 4, 4)
    precision: Literal["32", "bf16"] = "32"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse, by a ValueError that names the field, a value that cannot be used."""
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}, must be from 0 to below 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, must be at least 1")
        for name in ("patch", "dense_every"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or min(value) < 1):
                raise ValueError(f"{name} is {value}, must be three sizes D H W of at least 1")
        if self.pool == "aggregator" and self.patch is not None:
            raise ValueError("patch is of pool mean; the aggregator takes slices as it was trained on")


def main(argv: Sequence[str]) -> int:
    """Write the embeddings of every volume."""
    from ssl3d.config import parse

    options = parse("ssl3d embed", EmbedOptions, argv).options
    from ssl3d.data.open import open_data_for
    from ssl3d.specs import encoder_from, pooled_by

    encoder = pooled_by(options.pool, encoder_from(options.encoder), options.encoder)
    count = embed_collection(encoder, open_data_for([encoder], options.data), options)
    print(f"{count_of(count, 'embedding')} of length {encoder.embed_dim} in {options.out}")
    return 0


def embed_collection(
    encoder: Encoder, data: Collection, options: EmbedOptions, say: Callable[[str], None] = print
) -> int:
    """Write the embedding, identity and label of every volume into a file, and return how many.

    An `AggregatedEncoder` pools with its aggregator (see `pooled_by`). The file appears when it is
    complete. Volumes that cannot be read are named and left out.

    Raises:
        UsageError: The file exists, or the encoder takes other channels.
        DataError: No volume could be embedded.
    """
    import h5py
    import numpy as np
    import torch

    from ssl3d.data.store.windows import voxels_of
    from ssl3d.encoders.inference import dense_features, embed_volume
    from ssl3d.heads.aggregator import AggregatedEncoder
    from ssl3d.training.device import device_of

    if options.out.exists() and not options.overwrite:
        raise UsageError(f"--out {options.out}: exists; --overwrite replaces it")
    _check(encoder, data, say)
    device = torch.device(device_of(options.device))
    encoder = encoder.to(device).eval()
    patch = patch_of(encoder, options.patch)
    autocast = torch.bfloat16 if options.precision == "bf16" else None
    windows = options.overlap, options.batch_size
    vectors: list[np.ndarray] = []
    kept: list[int] = []
    try:
        with whole_file(options.out) as temporary, h5py.File(temporary, "w") as file:
            for position, volume in enumerate(data):
                maps = None
                try:
                    if isinstance(encoder, AggregatedEncoder):
                        voxels = volume.read().to(device)
                        vector = encoder.aggregator.embed_volume(encoder.encoder, voxels, autocast=autocast)
                    else:
                        voxels = voxels_of(volume, device)
                        vector = embed_volume(encoder, voxels, patch, *windows, autocast=autocast)
                    if options.dense:
                        maps = dense_features(
                            encoder, voxels, patch, *windows,
                            levels=options.dense_levels, every=options.dense_every, autocast=autocast,
                        )  # fmt: skip
                except (DataError, OSError) as error:
                    say(f"set aside: {volume.dataset}/{volume.id}: {error}")
                    continue
                if maps is not None:
                    half = maps.cpu().numpy().astype(np.float16)
                    file.create_dataset(f"dense/{len(kept)}", data=half, chunks=True)
                vectors.append(vector.float().cpu().numpy())
                kept.append(position)
            if not kept:
                raise DataError(f"no volume could be embedded of {count_of(len(data), 'volume')}")
            _write(file, np.stack(vectors), data.select(kept), encoder, options, patch)
    except OSError as error:
        # HDF5 wraps the words of the system in its own.
        why = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"--out {options.out}: cannot be written ({why})") from error
    return len(kept)


def patch_of(encoder: Encoder, asked: Sequence[int] | None) -> tuple[int, int, int]:
    """Choose the window to embed with: as asked, else the training crop, else a usual size."""
    trained = getattr(encoder, "metadata", {}).get("patch")
    chosen = asked or (trained if trained and all(trained) else FALLBACK_PATCH)
    return int(chosen[0]), int(chosen[1]), int(chosen[2])


def _check(encoder: Encoder, data: Collection, say: Callable[[str], None]) -> None:
    import numpy as np

    if not len(data):
        raise DataError("no volumes to embed")
    channels = sorted({int(shape[0]) for shape in data.shapes})
    if channels != [encoder.config.in_channels]:
        takes = encoder.config.in_channels
        has = " and ".join(map(str, channels))
        raise UsageError(f"the encoder takes {takes} channels, but the volumes have {has}")
    trained = getattr(encoder, "metadata", {}).get("spacing")
    if trained:
        here = np.median(np.asarray(data.spacings, float), axis=0)
        if np.any(np.abs(np.log(here / np.asarray(trained))) > np.log(1.25)):
            was = " x ".join(f"{v:.3g}" for v in trained)
            now = " x ".join(f"{v:.3g}" for v in here)
            say(f"note: the encoder was trained at {was} mm, these volumes have {now} mm (D x H x W)")


def _write(
    file: Any,
    embeddings: np.ndarray,
    data: Collection,
    encoder: Encoder,
    options: EmbedOptions,
    patch: tuple[int, int, int],
) -> None:
    import h5py
    import numpy as np

    text = h5py.string_dtype()
    file["embeddings"] = embeddings
    for name in ("ids", "datasets", "subjects", "splits"):
        column = [str(value) for value in getattr(data, name)]
        file.create_dataset(name, data=column, dtype=text)
    labels = list(data.labels)
    if any(isinstance(label, str) for label in labels):
        file.create_dataset(
            "labels", data=["" if label is None else str(label) for label in labels], dtype=text
        )
    else:
        file["labels"] = np.array(
            [np.nan if label is None else label for label in labels], dtype=np.float64
        )
    private = ("identities", "volumes_seen")
    about = {key: value for key, value in getattr(encoder, "metadata", {}).items() if key not in private}
    file.attrs["encoder"] = str(options.encoder)
    file.attrs["encoder_json"] = json.dumps(about, default=str)
    file.attrs["patch"] = patch
    file.attrs["overlap"] = options.overlap
    file.attrs["pool"] = options.pool
    if options.dense:
        file["dense"].attrs["every"] = options.dense_every
        file["dense"].attrs["levels"] = options.dense_levels
