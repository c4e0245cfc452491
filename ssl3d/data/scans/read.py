"""Reads one scan of any format into canonical voxels, with nibabel, SimpleITK and Pillow."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data import geometry
from ssl3d.data.geometry import CANONICAL, UNKNOWN, Triple
from ssl3d.data.scans.dicom import (
    FILMS,
    Slice,
    check_frames,
    dicom_tags,
    frame_count,
    in_order,
    slices_of,
    stack_affine,
)
from ssl3d.data.scans.dicom_frames import read_frames
from ssl3d.data.scans.itk import affine_of, information, quiet_sitk
from ssl3d.errors import DataError

NIFTI = (".nii.gz", ".nii")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
ARRAYS = (".npz",)
_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI's codes of metres and microns; no unit is taken as mm
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
        notes: What was done to the source, for the record. "copies": slices met twice and left out.
    """

    voxels: np.ndarray
    affine: np.ndarray
    orientation: str
    original_shape: tuple[int, ...]
    original_affine: np.ndarray | None = None
    modality: str = ""
    eight_bit: bool = False
    colours: bool = False
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

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

            affine = _nifti_affine(nibabel.load(first))[0]
        elif ending in PICTURES:
            return 1.0, 1.0, 1.0
        elif ending in ITK:
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
    affine, placed = _nifti_affine(image)
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


def _nifti_affine(image: Any) -> tuple[np.ndarray, bool]:
    """(i, j, k) to RAS+ mm, and whether the header says where in the patient that is.

    Raises:
        DataError: The affine places no volume.
    """
    header = image.header
    affine = np.array(image.affine, dtype=np.float64)
    sform, qform = int(header.get("sform_code", 1)), int(header.get("qform_code", 1))
    try:
        geometry.check_affine(affine)
    except DataError:
        if not (sform and qform):
            raise
        affine = np.array(image.get_qform(), dtype=np.float64)  # some tools leave zeros in the sform
        geometry.check_affine(affine)
    affine[:3] *= _MILLIMETRES.get(int(header.get("xyzt_units", 0)) & 7, 1.0)
    return affine, bool(sform or qform)


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
    """A file or a series; GDCM itself turns MONOCHROME1, whose lowest value is white, into MONOCHROME2."""
    tags = {path: dicom_tags(path) for path in files}
    first = tags[files[0]]
    header = information(files[0], "GDCMImageIO")
    _check_size((*header.GetSize(), len(files)), max_voxels)
    film = first["modality"] in FILMS  # of several frames: a film, not a volume
    if len(files) > 1:
        pixels = _read_series(tags, header_only)
    elif frame_count(first) > 1 and not film:
        pixels = _read_multiframe(files[0], header, header_only)
    else:
        unplaced = film or not first["axes"]
        if header_only:
            pixels = _without_voxels(header, unplaced)
        else:
            pixels = _from_sitk(_dicom_image(files[0]), unplaced)
    pixels.modality = first["modality"]
    return pixels


def _read_series(tags: dict[Path, dict[str, str]], header_only: bool) -> Pixels:
    paths, slices = list(tags), slices_of(tags)
    order, place = in_order(slices)
    ordered = [slices[i] for i in order]
    plane = affine_of(information(paths[order[0]], "GDCMImageIO"))[:3, :2]
    affine = stack_affine(ordered, place, plane)
    if header_only:
        return _pixels(np.empty((1, 1, 1, 1)), affine, ())
    layers = []
    for path in (paths[i] for i in order):
        image = _dicom_image(path)
        layer = quiet_sitk().GetArrayFromImage(image)  # ([1, ]J, I[, C])
        layers.append(layer[0] if image.GetDimension() == 3 else layer)
    # Rescaled, the slices may be of several types; one that holds all their values.
    common = np.result_type(*layers)
    voxels = np.stack(layers, dtype=np.float32 if common.kind == "f" else common)
    return _from_slices(voxels, ordered, place, affine)


def _read_multiframe(path: Path, header: Any, header_only: bool) -> Pixels:
    frames = read_frames(path)
    count = header.GetSize()[2]
    if len(frames.slices) != count:
        if frames.stacked:
            return _without_voxels(header) if header_only else _from_sitk(_dicom_image(path))
        raise DataError(
            f"{count} frames, and the header does not tell where each lies: save them as single slices, "
            "or as NIfTI"
        )
    order, place = in_order(frames.slices)
    ordered = [frames.slices[i] for i in order]
    rows, columns = ordered[0].spacing or header.GetSpacing()[1::-1]
    axes = np.array(ordered[0].axes).reshape(2, 3)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    plane = (axes * (-1, -1, 1)).T * (columns, rows)  # LPS to RAS; a row's pixels lie a column apart
    affine = stack_affine(ordered, place, plane)
    if header_only:
        return _pixels(np.empty((1, 1, 1, 1)), affine, ())
    voxels = quiet_sitk().GetArrayFromImage(_dicom_image(path))
    if len(set(frames.rescale)) > 1:
        # GDCM rescales all frames as the first.
        slope, intercept = np.array(frames.rescale, dtype=np.float32).T[:, :, None, None]
        stored = (voxels.astype(np.float32) - intercept[0]) / slope[0]
        voxels = stored * slope + intercept
    return _from_slices(voxels[order], ordered, place, affine)


def _from_slices(
    voxels: np.ndarray, ordered: Sequence[Slice], place: np.ndarray, affine: np.ndarray
) -> Pixels:
    """A stack of (n, J, I[, C]) voxels in order, with those at one place as frames."""
    keep = _without_copies(voxels, ordered, place)
    copies = len(ordered) - len(keep)
    if copies:
        voxels, place, ordered = voxels[keep], place[keep], [ordered[i] for i in keep]
    frames = check_frames(ordered, place)
    colours = voxels.ndim == 4
    if colours and frames > 1:
        raise DataError(f"colours in {frames} frames; expected one or the other")
    places = int(place[-1]) + 1
    stack = voxels if colours else voxels.reshape(places, frames, *voxels.shape[1:])
    stack = np.moveaxis(stack, -1 if colours else 1, 0)  # (F, K, J, I)
    shape = stack.shape[:0:-1] + ((len(stack),) if len(stack) > 1 else ())
    pixels = _pixels(stack, affine, shape, colours)
    pixels.notes = {"copies": copies} if copies else {}
    return pixels


def _without_copies(voxels: np.ndarray, ordered: Sequence[Slice], place: np.ndarray) -> list[int]:
    """Indices of the slices less those that repeat another of the same place and header, voxel for voxel.

    Raises:
        DataError: Two that nothing tells apart hold different voxels.
    """
    keep = [0]
    for i in range(1, len(ordered)):
        one, last = ordered[i], ordered[keep[-1]]
        tied = place[i] == place[keep[-1]] and (one.phase, one.key) == (last.phase, last.key)
        if not tied:
            keep.append(i)
        elif not np.array_equal(voxels[i], voxels[keep[-1]]):
            raise DataError(
                f"{last.name} and {one.name} lie at one place, and nothing else tells their frames apart"
            )
    return keep


def _without_voxels(header: Any, unplaced: bool = False) -> Pixels:
    """What the header of one file alone tells: where the voxels are."""
    nothing = np.empty((1, 1, 1, 1))
    return _picture(nothing, header, ()) if unplaced else _pixels(nothing, affine_of(header), ())


def _dicom_image(path: Path) -> Any:
    return quiet_sitk().ReadImage(str(path), imageIO="GDCMImageIO")


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
    if dimension == 2 or unplaced:
        return _picture(voxels, image, shape, components == 3)
    return _pixels(voxels, affine_of(image), shape, components == 3)


def _pixels(
    voxels: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], colours: bool = False
) -> Pixels:
    """(F, K, J, I) voxels at their place in the patient."""
    geometry.check_affine(affine)
    canonical, moved = geometry.to_canonical(np.moveaxis(voxels, (1, 2, 3), (3, 2, 1)), affine)
    return Pixels(canonical, moved, CANONICAL, shape, affine, "", voxels.dtype == np.uint8, colours)


def _picture(voxels: np.ndarray, image: Any, shape: tuple[int, ...], colours: bool = False) -> Pixels:
    """(F, K, J, I) voxels whose place is unknown, but not their sides in the plane."""
    sides = [float(side) for side in image.GetSpacing()[:2]]
    affine = geometry.unknown_affine((1.0, sides[1], sides[0]))
    return Pixels(voxels, affine, UNKNOWN, shape, None, "", voxels.dtype == np.uint8, colours)


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
