"""Reads one scan of any format into canonical voxels, with nibabel, SimpleITK and Pillow."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssl3d.data import geometry
from ssl3d.data.dicom import RADIOGRAPHS, dicom_tags, frames_of, sorted_slices
from ssl3d.data.geometry import CANONICAL, UNKNOWN, Triple
from ssl3d.data.itk import affine_of, information, quiet_sitk
from ssl3d.errors import DataError

NIFTI = (".nii.gz", ".nii")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
ARRAYS = (".npz",)
FORMATS = "NIfTI, NRRD, MHA/MHD, DICOM, MedMNIST .npz, PNG, JPEG"


@dataclasses.dataclass
class Pixels:
    """A scan as read: canonical order, values untouched.

    Attributes:
        voxels: (F, D, H, W), F frames or channels, in the source's type.
        affine: (d, h, w) to patient mm.
        orientation: "SAR" or "unknown".
        original_shape: Of the source's array.
        original_affine: (i, j, k) of the source to RAS+ mm; None where the format has none.
        modality: DICOM code, "" where the format has none.
        eight_bit: Whether the source held unsigned bytes.
        colours: Whether the F axis is red, green, blue.
    """

    voxels: np.ndarray
    affine: np.ndarray
    orientation: str
    original_shape: tuple[int, ...]
    original_affine: np.ndarray | None = None
    modality: str = ""
    eight_bit: bool = False
    colours: bool = False

    @property
    def spacing(self) -> Triple:
        """Voxel sides along (D, H, W), mm."""
        return geometry.spacing_of(self.affine)


def suffix_of(path: Path) -> str:
    """The file's ending in lower case, `.nii.gz` as one; "" where it has none."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def stem_of(path: Path) -> str:
    """The file's name without its ending."""
    ending = suffix_of(path)
    return path.name[: -len(ending)] if ending else path.name


def read(files: Sequence[Path], max_voxels: int | None = None) -> Pixels:
    """Reads a file, or the files of one DICOM series.

    Args:
        files: One file; several are the slices of a series, in any order.
        max_voxels: More voxels than this are refused before they are read.

    Raises:
        DataError: What is wrong with the file, without its name.
    """
    first = files[0]
    for path in files:
        _check_file(path)
    ending = suffix_of(first)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ending in NIFTI:
                return _read_nifti(first, max_voxels)
            if ending in ITK:
                return _read_itk(first, max_voxels)
            if ending in PICTURES:
                return _read_picture(first, max_voxels)
            return _read_dicom(list(files), max_voxels)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError("does not fit into memory") from error
    except Exception as error:  # the readers raise nearly anything on damaged files
        raise DataError(f"unreadable: {_reason(error)}") from error


def header_spacing(files: Sequence[Path]) -> Triple:
    """Spacing (D, H, W) in mm of the canonical volume, from the header alone.

    Raises:
        DataError: The header cannot be read.
    """
    first = files[0]
    ending = suffix_of(first)
    try:
        if ending in NIFTI:
            import nibabel

            image: Any = nibabel.load(first)
            affine: np.ndarray = np.array(image.affine, dtype=np.float64)
        elif ending in PICTURES:
            return 1.0, 1.0, 1.0
        elif ending in ITK or len(files) == 1:
            affine = affine_of(information(first))
        else:
            return _read_dicom(list(files), None, header_only=True).spacing
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"unreadable: {_reason(error)}") from error
    geometry.check_affine(affine)
    return geometry.spacing_of(geometry.to_canonical(np.empty((1, 1, 1)), affine)[1])


def read_mask(path: Path, files: Sequence[Path] = ()) -> Pixels:
    """Reads a label map: whole numbers from 0.

    Raises:
        DataError: It cannot be read, has several frames, or holds other values.
    """
    pixels = read(list(files) or [path])
    if len(pixels.voxels) != 1:
        raise DataError(f"mask {path.name}: {len(pixels.voxels)} frames or colours; expected one label map")
    voxels = pixels.voxels
    if voxels.dtype.kind not in "iub":
        rounded = np.rint(voxels)
        if not np.isfinite(voxels).all() or np.abs(voxels - rounded).max() > 1e-3:
            raise DataError(f"mask {path.name}: values such as {_odd(voxels):.4g}; expected whole numbers")
        voxels = rounded
    if voxels.min() < 0 or voxels.max() > 65535:
        raise DataError(
            f"mask {path.name}: labels {voxels.min():g} to {voxels.max():g}; expected 0 to 65535"
        )
    pixels.voxels = voxels.astype(np.uint16 if voxels.max() > 255 else np.uint8)
    return pixels


def sha256_of(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, of their digests in the order of their names."""
    digests = []
    for path in sorted(files):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


# Formats ------------------------------------------------------------------------------------------


def _read_nifti(path: Path, max_voxels: int | None) -> Pixels:
    import nibabel

    image: Any = nibabel.load(path)
    shape = tuple(int(n) for n in image.shape)
    _check_size(shape, max_voxels)
    affine = np.asarray(image.affine, dtype=float)
    geometry.check_affine(affine)
    voxels = np.asanyarray(image.dataobj)
    colours = False
    if voxels.dtype.names:  # RGB is a structured type
        voxels = np.stack([voxels[name] for name in voxels.dtype.names[:3]], axis=-1)
        colours = True
    elif voxels.dtype.kind == "c":
        raise DataError("complex voxels; save the magnitude")
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim == 5 and voxels.shape[3] == 1:  # vector-valued: (I, J, K, 1, C)
        voxels = voxels[:, :, :, 0]
    if voxels.ndim == 2:
        voxels = voxels[:, :, None]
    if voxels.ndim not in (3, 4):
        raise DataError(f"{len(shape)} axes {shape}; expected 3, or 4 with frames")
    frames = voxels[None] if voxels.ndim == 3 else np.moveaxis(voxels, -1, 0)
    placed = int(image.header.get("sform_code", 1)) or int(image.header.get("qform_code", 1))
    canonical, affine_dhw = geometry.to_canonical(frames, affine)
    return Pixels(
        canonical,
        affine_dhw,
        CANONICAL if placed else UNKNOWN,
        shape,
        affine,
        eight_bit=voxels.dtype == np.uint8,
        colours=colours,
    )


def _read_itk(path: Path, max_voxels: int | None) -> Pixels:
    header = information(path)
    _check_size((*header.GetSize(), header.GetNumberOfComponents()), max_voxels)
    _check_length(path, header)
    return _from_sitk(quiet_sitk().ReadImage(str(path)))


def _read_picture(path: Path, max_voxels: int | None) -> Pixels:
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        picture: Image.Image = opened
        _check_size(picture.size, max_voxels)
        pages = getattr(picture, "n_frames", 1)
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


def _read_dicom(files: list[Path], max_voxels: int | None, header_only: bool = False) -> Pixels:
    sitk = quiet_sitk()
    tags = {path: dicom_tags(path) for path in files}
    first = tags[files[0]]
    header = information(files[0], "GDCMImageIO")
    _check_size((*header.GetSize(), len(files)), max_voxels)
    if len(files) == 1:
        image = sitk.ReadImage(str(files[0]), imageIO="GDCMImageIO")
        flat = image.GetDimension() == 2 or image.GetSize()[2] == 1
        film = first["modality"] in (*RADIOGRAPHS, "US")  # of several frames: a film, not a volume
        pixels = _from_sitk(image, film or (flat and not first["axes"]))
    else:
        ordered, positions = sorted_slices(tags)
        frames, gap = frames_of(positions)
        if header_only:
            image = sitk.ReadImage(str(ordered[0]), imageIO="GDCMImageIO")
            affine = affine_of(image)
            affine[:3, 2] *= gap / np.linalg.norm(affine[:3, 2])
            voxels, moved = geometry.to_canonical(np.empty((1, 1, 1, 1)), affine)
            return Pixels(voxels, moved, CANONICAL, ())
        volumes = [_series(sitk, ordered[frame::frames]) for frame in range(frames)]
        pixels = volumes[0]
        if frames > 1:
            pixels.voxels = np.concatenate([volume.voxels for volume in volumes])
            pixels.original_shape = (*pixels.original_shape, frames)
    pixels.modality = first["modality"]
    if first["photometric"] == "MONOCHROME1":  # dark means bright
        pixels.voxels = pixels.voxels.max() - (pixels.voxels - pixels.voxels.min())
    return pixels


def _series(sitk: ModuleType, files: Sequence[Path]) -> Pixels:
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(path) for path in files])
    return _from_sitk(reader.Execute())


def _from_sitk(image: Any, unplaced: bool = False) -> Pixels:
    sitk = quiet_sitk()
    components = image.GetNumberOfComponentsPerPixel()
    dimension = image.GetDimension()
    if "complex" in image.GetPixelIDTypeAsString():
        raise DataError("complex voxels; save the magnitude")
    voxels = sitk.GetArrayFromImage(image)  # (..., K, J, I[, C])
    shape = tuple(int(n) for n in image.GetSize()) + ((components,) if components > 1 else ())
    voxels = np.moveaxis(voxels, -1, 0) if components > 1 else voxels[None]
    if dimension == 4:
        if components > 1:
            raise DataError(f"{components} components in 4 dimensions; expected one or the other")
        voxels = voxels[0]
    elif dimension == 2:
        voxels = voxels[:, None]
    elif dimension != 3:
        raise DataError(f"{dimension} dimensions; expected 2, 3 or 4")
    eight_bit, colours = voxels.dtype == np.uint8, components == 3
    if dimension == 2 or unplaced:
        sides = [float(side) for side in image.GetSpacing()[:2]]
        affine = geometry.unknown_affine((1.0, sides[1], sides[0]))
        return Pixels(voxels, affine, UNKNOWN, shape, None, "", eight_bit, colours)
    affine = affine_of(image)
    geometry.check_affine(affine)
    canonical, moved = geometry.to_canonical(np.moveaxis(voxels, (1, 2, 3), (3, 2, 1)), affine)
    return Pixels(canonical, moved, CANONICAL, shape, affine, "", eight_bit, colours)


# Checks -------------------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    try:
        if path.stat().st_size == 0:
            raise DataError("empty file")
    except OSError as error:
        raise DataError(error.strerror or "cannot be opened") from error


def _check_size(shape: Sequence[int], max_voxels: int | None) -> None:
    count = math.prod(shape)
    if count == 0:
        raise DataError(f"empty: shape {tuple(shape)}")
    if max_voxels is not None and count > max_voxels:
        raise DataError(f"{count:,} voxels {tuple(shape)}, more than --max-voxels {max_voxels:,}")


def _check_length(path: Path, header: Any) -> None:
    """MetaImage prints lines of its own about a short file before it fails: compare lengths first."""
    if suffix_of(path) != ".mha":
        return
    with open(path, "rb") as file:
        text = file.read(4096)
    if re.search(rb"CompressedData\s*=\s*True", text) or b"ElementDataFile = LOCAL" not in text:
        return
    sitk = quiet_sitk()
    one = sitk.Image([1] * 2, header.GetPixelID(), header.GetNumberOfComponents())
    needed = (
        math.prod(header.GetSize()) * one.GetSizeOfPixelComponent() * one.GetNumberOfComponentsPerPixel()
    )
    if path.stat().st_size < needed:
        raise DataError(f"cut short: {path.stat().st_size:,} bytes, the header promises {needed:,}")


def _odd(voxels: np.ndarray) -> float:
    odd = voxels[~(np.abs(voxels - np.rint(voxels)) <= 1e-3)]
    return float(odd.reshape(-1)[0])


def _reason(error: BaseException) -> str:
    """The informative line of a reader's error; ITK puts it last, after its own file and line.

    Its "Reason: ..." after that is whatever the system said last, about something else.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Reason:")] or lines
    text = lines[-1] if lines else type(error).__name__
    text = re.sub(r"^(sitk::)?ERROR:\s*", "", text)
    text = re.sub(r"\w+\(0x[0-9a-f]+\):\s*", "", text)
    return re.sub(r"(/[\w.\-]+)+/([\w.\-]+)", r"\2", text)[:200]
