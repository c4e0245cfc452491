"""Pictures of one page, read with Pillow: grey or in colours, without a place in the patient."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl3d.data import geometry
from ssl3d.data.geometry import UNKNOWN, Triple
from ssl3d.data.scans.pixels import Pixels, check_size
from ssl3d.errors import DataError


def read_picture(files: Sequence[Path], max_voxels: int | None) -> Pixels:
    """Read a picture, turned as its EXIF header says, as a volume of depth 1.

    Raises:
        DataError: The picture has several pages, or more pixels than `max_voxels`.
    """
    from PIL import Image, ImageOps

    with Image.open(files[0]) as opened:
        picture: Image.Image = opened
        check_size(picture.size, max_voxels)
        pages = getattr(picture, "n_frames", 1)
        if picture.format == "PNG":
            _check_png(files[0])
        if pages > 1 and picture.format != "MPO":  # a telephone's JPEG, whose second page is a preview
            raise DataError(f"{pages} pages in one picture; save them one by one, or as NIfTI")
        picture = ImageOps.exif_transpose(picture)  # as it is to be looked at
        if picture.mode == "P":
            picture = picture.convert("RGB")
        if picture.mode in ("LA", "RGBA", "La", "RGBa", "PA"):
            picture = picture.convert("L" if picture.mode in ("LA", "La") else "RGB")
        elif picture.mode in ("1", "CMYK", "YCbCr", "LAB", "HSV"):
            picture = picture.convert("L" if picture.mode == "1" else "RGB")
        voxels = np.asarray(picture)
    colours = voxels.ndim == 3
    frames = np.moveaxis(voxels, -1, 0) if colours else voxels[None]
    return Pixels(
        frames[:, None],
        geometry.unknown_affine((1.0, 1.0, 1.0)),
        UNKNOWN,
        tuple(voxels.shape),
        eight_bit=voxels.dtype == np.uint8,
        colours=colours,
    )


def _check_png(path: Path) -> None:
    """Refuse a PNG of which a check sum does not hold; Pillow does not look at that of the pixels.

    Raises:
        DataError: The file is damaged or cut short.
    """
    with open(path, "rb") as file:
        file.seek(8)
        kind = b""
        while kind != b"IEND":
            head = file.read(8)
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            total = zlib.crc32(kind)
            while length:
                block = file.read(min(length, 1 << 20))
                if not block:
                    raise DataError("cut short: its last part does not end")
                total, length = zlib.crc32(block, total), length - len(block)
            if file.read(4) != total.to_bytes(4, "big"):
                name = kind.decode("ascii", "replace")
                raise DataError(f"damaged: the check sum of {name} does not hold" if name else "cut short")


def picture_spacing(files: Sequence[Path]) -> Triple:
    """Return the spacing of a picture, whose file says nothing of it: 1 mm along each axis."""
    return 1.0, 1.0, 1.0
