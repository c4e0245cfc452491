"""Pictures of one page, read with Pillow: grey or in colours, without a place in the patient."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.amounts import count_of
from ssl3d.data import geometry
from ssl3d.data.geometry import UNKNOWN, Triple
from ssl3d.data.scans.itk import image_of, quiet_sitk
from ssl3d.data.scans.pixels import Pixels, check_size
from ssl3d.errors import DataError

# Tags of TIFF.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = (
    256,
    257,
    258,
    259,
    262,
    274,
    277,
)
_DECODED = 8  # bytes of memory for a pixel: Pillow's own, those of another mode, and numpy's
_ROWS, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT = 278, 284, 322, 323
_STRIPS, _TILES = (273, 279), (324, 325)  # where they begin, and their lengths


def read_picture(files: Sequence[Path], max_voxels: int | None, labels: bool = False) -> Pixels:
    """Read a picture, turned as its EXIF header says, as a volume of depth 1.

    Args:
        files: File of the picture.
        max_voxels: Largest number of pixels that is not refused.
        labels: Whether its values are labels: the indices of a palette, 0 and 1 of single bits.

    Raises:
        DataError: The picture has several pages, more pixels than `max_voxels` or than its file holds, or a
            check sum that does not hold; or it is of labels and lossy.
    """
    from PIL import Image, ImageOps

    with Image.open(files[0]) as opened:
        picture: Any = opened
        check_size(picture.size, max_voxels, _DECODED)
        pages = getattr(picture, "n_frames", 1)
        if picture.format == "PNG":
            _check_png(files[0])
        elif picture.format == "TIFF":
            _check_tiff(picture.tag_v2, files[0].stat().st_size)
        elif picture.format in ("JPEG", "MPO"):
            _check_jpeg(picture.size, files[0].stat().st_size)
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
            if kind == "TIFF" and tags.get(_PHOTOMETRIC) == 0 and picture.mode != "L":
                # Pillow turns those of eight bits itself.
                if voxels.dtype.kind != "u":
                    raise DataError(
                        f"its lowest value is white by the header, and of {voxels.dtype} nothing says what "
                        "is black; save it with 0 as black"
                    )
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
        DataError: It is a TIFF that is to be turned, which SimpleITK does in some cases itself, or of a
            kind that it reads with 8 bits; or it is grey with transparency.
    """
    if turned != 1 and kind != "PNG":
        raise DataError("16 bits a colour, and to be turned by its header; save it upright")
    with open(path, "rb") as file:
        if kind == "PNG" and file.read(26)[25] == 4:  # neither Pillow nor SimpleITK keeps them
            raise DataError("grey of 16 bits with transparency; save it without")
    image = image_of(path)
    values = quiet_sitk().GetArrayFromImage(image).reshape(*image.GetSize()[1::-1], -1)
    if values.dtype.itemsize < 2:  # such as one whose colours lie in planes
        raise DataError(
            "more than 8 bits a colour, laid out so that only 8 of them can be read; save it as PNG, or "
            "with the colours of a pixel side by side"
        )
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


def _check_jpeg(sides: tuple[int, int], size: int) -> None:
    """Refuse a JPEG of fewer bits than it has blocks of 8 x 8 pixels: libjpeg makes the rest grey."""
    if sides[0] * sides[1] > 512 * size:
        raise DataError(
            f"cut short: {size:,} bytes, its header promises {sides[0]:,} x {sides[1]:,} pixels"
        )


def _check_tiff(tags: Any, size: int) -> None:
    """Refuse a TIFF whose strips or tiles do not cover it: Pillow leaves the rest of it black.

    Args:
        tags: Tags of the page.
        size: Bytes of the file.

    Raises:
        DataError: The file is damaged or cut short.
    """
    width, height = int(tags[_WIDTH]), int(tags[_HEIGHT])
    tiled = _TILES[0] in tags
    starts, lengths = (tags.get(tag, ()) for tag in (_TILES if tiled else _STRIPS))
    bits, samples = tags.get(_BITS, (1,)), int(tags.get(_SAMPLES, 1))
    apart = int(tags.get(_PLANAR, 1)) == 2
    wide = int(tags.get(_TILE_WIDTH, 0)) if tiled else width
    high = int(tags.get(_TILE_HEIGHT, 0)) if tiled else min(int(tags.get(_ROWS, height)), height)
    if min(width, height, wide, high, samples) < 1:
        raise DataError(f"damaged: a picture of {width} x {height}, in pieces of {wide} x {high}")
    rows = -(-height // high)
    needed = rows * -(-width // wide) * (samples if apart else 1)
    if len(starts) < needed:
        raise DataError(
            f"damaged: {count_of(len(starts), 'piece')} of {wide} x {high}, its header promises {needed:,} "
            f"({width} x {height})"
        )
    # Of these Pillow does not look at the lengths; YCbCr (6) may have fewer values than pixels.
    plain = int(tags.get(_COMPRESSION, 1)) == 1 and tags.get(_PHOTOMETRIC) != 6
    line = -(-wide * int(bits[0]) * (1 if apart else samples) // 8)
    for number, start in enumerate(starts[:needed]):
        last = not tiled and number % rows == rows - 1
        own = line * (height - (rows - 1) * high if last else high)
        length = own if plain else lengths[number] if number < len(lengths) else 0
        if start + length > size:
            raise DataError(f"cut short: {size:,} bytes, its header promises {start + length:,}")


def picture_spacing(files: Sequence[Path]) -> Triple:
    """Return the spacing of a picture, whose file says nothing of it: 1 mm along each axis."""
    return 1.0, 1.0, 1.0
