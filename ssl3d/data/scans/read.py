"""Reads one scan of any format into canonical voxels; the formats, and all suffixes of files, stand here.

A further format is one more line of `FORMATS`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ssl3d import memory
from ssl3d.data.geometry import Triple
from ssl3d.data.scans.dicom_pixels import looks_like_dicom
from ssl3d.data.scans.dicom_voxels import dicom_spacing, read_dicom
from ssl3d.data.scans.itk import itk_spacing, read_itk
from ssl3d.data.scans.itk_files import detached_voxels
from ssl3d.data.scans.nifti import nifti_spacing, pair_of, read_nifti, read_pair
from ssl3d.data.scans.pictures import picture_spacing, read_label_picture, read_picture
from ssl3d.data.scans.pixels import Pixels as Pixels
from ssl3d.errors import DataError, is_transient


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of scans: how its files are known, and what reads them.

    Attributes:
        name: Name of the format in messages.
        suffixes: Endings of the files' names, in lower case.
        kind: Content of a file: a volume, a picture, a slice (of a series, or a whole volume), or rows
            (arrays with a volume per row, which `ssl3d.data.scans.arrays` reads).
        read: Reader of a file, or of the files of a series, given the largest number of voxels allowed.
        header: Reader of the spacing (D, H, W) in mm from the header alone.
        others: Finder of the further files that a file needs, such as that with the voxels of a header.
        read_labels: Reader of a label map, where it reads other values than those that are looked at.
        signed: Test of a file's first bytes, which tells the format where the suffix does not.
    """

    name: str
    suffixes: tuple[str, ...]
    kind: Literal["volume", "picture", "slice", "rows"]
    read: Callable[[Sequence[Path], int | None], Pixels]
    header: Callable[[Sequence[Path]], Triple]
    others: Callable[[Path], Iterable[Path]] = lambda path: ()
    read_labels: Callable[[Sequence[Path], int | None], Pixels] | None = None
    signed: Callable[[Path], bool] | None = None


def _refuse_rows(files: Sequence[Path], max_voxels: int | None = None) -> Pixels:
    raise DataError("an archive of arrays with a volume per row; expected a file of one scan")


def _rows_spacing(files: Sequence[Path]) -> Triple:
    raise DataError("an archive of arrays, which has no spacing")


_DICOM = Format(
    "DICOM",
    (".dcm", ".dcm.gz", ".dicom", ".ima"),
    "slice",
    read_dicom,
    dicom_spacing,
    signed=looks_like_dicom,
)
FORMATS = (
    Format("NIfTI", (".nii.gz", ".nii"), "volume", read_nifti, nifti_spacing),
    Format(
        "NIfTI or Analyze in two files",
        (".img", ".hdr", ".img.gz", ".hdr.gz"),
        "volume",
        read_pair,
        nifti_spacing,
        others=pair_of,
    ),
    Format("FreeSurfer", (".mgz", ".mgh"), "volume", read_nifti, nifti_spacing),
    Format("MINC", (".mnc",), "volume", read_nifti, nifti_spacing),
    Format("NRRD", (".nrrd", ".nhdr"), "volume", read_itk, itk_spacing, detached_voxels),
    Format("MHA/MHD", (".mha", ".mhd"), "volume", read_itk, itk_spacing, detached_voxels),
    _DICOM,
    Format("MedMNIST .npz", (".npz",), "rows", _refuse_rows, _rows_spacing),
    Format("PNG", (".png",), "picture", read_picture, picture_spacing, read_labels=read_label_picture),
    Format(
        "JPEG", (".jpg", ".jpeg"), "picture", read_picture, picture_spacing, read_labels=read_label_picture
    ),
    Format("BMP", (".bmp",), "picture", read_picture, picture_spacing, read_labels=read_label_picture),
    Format(
        "TIFF", (".tif", ".tiff"), "picture", read_picture, picture_spacing, read_labels=read_label_picture
    ),
)
KNOWN_FORMATS = ", ".join(form.name for form in FORMATS)
"""Names of the formats, for messages."""

LISTS = (".csv", ".tsv")
OWN_TABLES = ("rejected.csv", "left_out.csv")
"""Tables that `ssl3d prepare` writes beside a store, which are no lists of scans."""
STORES = (".h5", ".hdf5")
NO_SCANS = frozenset((*LISTS, *STORES, ".json", ".txt", ".md", ".pdf", ".xml", ".xlsx", ".yaml", ".yml"))
"""Suffixes of files that are never looked into for a scan."""

_BY_SUFFIX = {suffix: form for form in FORMATS for suffix in form.suffixes}
_COMPOUND = tuple(suffix for suffix in _BY_SUFFIX if suffix.count(".") > 1)


def suffix_of(path: Path) -> str:
    """Return the file's suffix in lower case, `.nii.gz` as one; "" where it has none."""
    name = path.name.lower()
    return next((suffix for suffix in _COMPOUND if name.endswith(suffix)), Path(name).suffix)


def stem_of(path: Path) -> str:
    """Return the file's name without its suffix."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.name


def without_suffix(path: str) -> str:
    """Return a path, as text, without its suffix."""
    suffix = suffix_of(Path(path))
    return path[: -len(suffix)] if suffix else path


def format_by_suffix(path: Path) -> Format | None:
    """Return the format that a file's suffix names; None where it names none."""
    return _BY_SUFFIX.get(suffix_of(path))


def format_of(path: Path) -> Format | None:
    """Return the format of a file by its suffix, else by its first bytes; None where it is no scan."""
    form = format_by_suffix(path)
    if form is not None:
        return form
    return next((form for form in FORMATS if form.signed is not None and form.signed(path)), None)


def is_whole(path: Path) -> bool:
    """Tell by the suffix whether a file is one scan by itself: a volume or a picture."""
    form = format_by_suffix(path)
    return form is not None and form.kind in ("volume", "picture")


def is_picture(path: Path) -> bool:
    """Tell by the suffix whether a file is a picture."""
    form = format_by_suffix(path)
    return form is not None and form.kind == "picture"


def is_slice(path: Path) -> bool:
    """Tell by the suffix or the first bytes whether a file is DICOM, and so perhaps one of a series."""
    form = format_of(path)
    return form is not None and form.kind == "slice"


def is_header_of_another(path: Path) -> bool:
    """Tell whether a file is the header of an image in two files, whose other file is the scan."""
    return suffix_of(path) in (".hdr", ".hdr.gz") and all(other.is_file() for other in pair_of(path))


def with_voxels(path: Path) -> Iterator[Path]:
    """Yield a file, and the others without which it is no scan."""
    yield path
    form = format_by_suffix(path)
    if form is not None and path.is_file():
        yield from form.others(path)


def read(files: Sequence[Path], max_voxels: int | None = None, labels: bool = False) -> Pixels:
    """Read a file, or the files of one DICOM series.

    Args:
        files: One file; several are the slices of a series, in any order.
        max_voxels: Largest number of voxels; a larger scan is refused before it is read.
        labels: Whether it is a label map: its values are then labels, such as the indices of a palette.

    Raises:
        DataError: The file is damaged or refused; the message does not name it.
    """
    for path in files:
        _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form = format_by_suffix(files[0]) or _DICOM
            return ((labels and form.read_labels) or form.read)(files, max_voxels)
    except DataError:
        raise
    except Exception as error:  # the readers raise nearly anything on damaged files
        if is_transient(error):
            raise
        raise DataError(f"unreadable: {_reason(error)}") from error


def header_spacing(files: Sequence[Path]) -> Triple:
    """Read the spacing (D, H, W) in mm of the canonical volume from the header alone.

    Raises:
        DataError: The header cannot be read.
    """
    try:
        return (format_by_suffix(files[0]) or _DICOM).header(files)
    except DataError:
        raise
    except Exception as error:
        if is_transient(error):
            raise
        raise DataError(f"unreadable: {_reason(error)}") from error


def read_mask(path: Path, files: Sequence[Path] = ()) -> Pixels:
    """Read a label map: whole numbers from 0.

    Args:
        path: File of the label map, for messages too.
        files: Files to read instead, where the map is a series.

    Raises:
        DataError: The map cannot be read, has several frames, or holds other values.
    """
    try:
        pixels = read(list(files) or [path], labels=True)
    except memory.TooLarge:
        raise
    except DataError as error:
        unknown = not files and path.is_file() and format_of(path) is None
        raise DataError(f"mask {path.name}: {'not a known format' if unknown else error}") from error
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
    """Compute the SHA-256 of a file; of several, that of their digests in the order of their names."""
    digests = []
    for path in sorted(files):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    try:
        if path.exists() and not path.is_file():  # to open a pipe is to wait for whoever writes into it
            raise DataError("no regular file, but a folder, a pipe or a device")
        with open(path, "rb") as file:  # ITK does not tell why it cannot open a file
            if not os.fstat(file.fileno()).st_size:
                raise DataError("empty file")
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        raise DataError(getattr(error, "strerror", None) or "cannot be opened") from error


def _odd(voxels: np.ndarray) -> float:
    odd = voxels[~(np.abs(voxels - np.rint(voxels)) <= 1e-3)]
    return float(odd.reshape(-1)[0])


def _reason(error: BaseException) -> str:
    """Return the informative line of a reader's error; ITK puts it last, after its own file and line.

    Its "Reason: ..." after that is whatever the system said last, about something else.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Reason:")] or lines
    text = lines[-1] if lines else type(error).__name__
    text = re.sub(r"^(sitk::)?ERROR:\s*", "", text)
    text = re.sub(r"\w+\(0x[0-9a-f]+\):\s*", "", text)
    return re.sub(r"(/[\w.\-]+)+/([\w.\-]+)", r"\2", text)[:200]
