"""Pictures of one page, read with Pillow: grey or in colours, without a place in the patient."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data import geometry
from ssl3d.data.geometry import UNKNOWN, Triple
from ssl3d.data.scans.itk import image_of, quiet_sitk
from ssl3d.data.scans.pixels import Pixels, check_size
from ssl3d.errors import DataError

_BITS, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274  # tags of TIFF


def read_picture(files: Sequence[Path], max_voxels: int | None, labels: bool = False) -> Pixels:
    """Read a picture, turned as its EXIF header says, as a volume of depth 1.

    Args:
        files: File of the picture.
        max_voxels: Largest number of pixels that is not refused.
        labels: Whether its values are labels: the indices of a palette, 0 and 1 of single bits.

    Raises:
        DataError: The picture has several pages, more pixels than `max_voxels`, or a check sum that does
            not hold; or it is of labels and lossy.
    """
    from PIL import Image, ImageOps

    with Image.open(files[0]) as opened:
        picture: Any = opened
        check_size(picture.size, max_voxels)
        pages = getattr(picture, "n_frames", 1)
        if picture.format == "PNG":
            _check_png(files[0])
        if pages > 1 and picture.format != "MPO":  # a telephone's JPEG, whose second page is a preview
            raise DataError(f"{pages} pages in one picture; save them one by one, or as NIfTI")
        kind, tags = picture.format, getattr(picture, "tag_v2", {})
        lossy = kind in ("JPEG", "MPO") or picture.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
        deep = _is_deep(picture, files[0])
        turned = picture.getexif().get(_ORIENTATION, 1)
        if not deep:
            picture = ImageOps.exif_transpose(picture)  # as it is to be looked at
        if labels and picture.mode in ("P", "PA"):
            voxels = np.asarray(picture)
            voxels = voxels[..., 0] if voxels.ndim == 3 else voxels
        elif labels and picture.mode == "1":
            voxels = np.asarray(picture).astype(np.uint8)
        elif deep:
            voxels = _deep_colours(files[0], turned, kind)
        else:
            if picture.mode in ("LA", "La", "1"):
                picture = picture.convert("L")
            elif picture.mode in ("P", "RGBA", "RGBa", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
                picture = picture.convert("RGB")
            voxels = np.asarray(picture)
            white = kind == "TIFF" and tags.get(_PHOTOMETRIC) == 0 and voxels.dtype.kind == "u"
            if white and picture.mode != "L":  # Pillow turns those of eight bits itself
                voxels = np.iinfo(voxels.dtype).max - voxels
    if labels and voxels.ndim == 3 and (voxels == voxels[..., :1]).all():
        voxels = voxels[..., 0]
    if labels and lossy:
        _check_lossy(voxels)
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


def read_label_picture(files: Sequence[Path], max_voxels: int | None) -> Pixels:
    """Read a picture whose values are labels; see `read_picture`."""
    return read_picture(files, max_voxels, labels=True)


def _is_deep(picture: Any, path: Path) -> bool:
    """Tell whether a picture has several values of 16 bits a pixel, of which Pillow keeps 8."""
    if picture.format == "PNG":
        with open(path, "rb") as file:
            head = file.read(26)
        return head[24] == 16 and head[25] in (2, 4, 6)
    bits = getattr(picture, "tag_v2", {}).get(_BITS, ())
    return len(bits) > 1 and max(bits) > 8


def _deep_colours(path: Path, turned: int, kind: str) -> np.ndarray:
    """Read a picture of 16 bits a value by SimpleITK, (H, W, 3).

    Raises:
        DataError: It is a TIFF that is to be turned, which SimpleITK does in some cases itself; or it is
            grey with transparency.
    """
    if turned != 1 and kind != "PNG":
        raise DataError("16 bits a colour, and to be turned by its header; save it upright")
    with open(path, "rb") as file:
        if kind == "PNG" and file.read(26)[25] == 4:  # neither Pillow nor SimpleITK keeps them
            raise DataError("grey of 16 bits with transparency; save it without")
    image = image_of(path)
    values = quiet_sitk().GetArrayFromImage(image).reshape(*image.GetSize()[1::-1], -1)
    flipped = values[:, ::-1] if turned in (2, 4, 5, 7) else values
    quarter = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(turned, 0)
    values = np.rot90(flipped, quarter)
    return np.ascontiguousarray(values[..., :3])


def _check_lossy(voxels: np.ndarray) -> None:
    """Refuse labels that were blurred: two values may be sharp, more are not told from blur."""
    values = np.unique(voxels)
    if len(values) > 2:
        few = ", ".join(map(str, values[:6].tolist()))
        raise DataError(
            f"a label map in JPEG, which blurs it: {len(values)} values "
            f"({few}{', ...' * (len(values) > 6)}); save it as PNG from its source"
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
