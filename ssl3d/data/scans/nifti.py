"""NIfTI files and other formats of neuroimaging, read with nibabel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d import memory
from ssl3d.data import geometry
from ssl3d.data.geometry import CANONICAL, UNKNOWN, Triple
from ssl3d.data.scans.pixels import Pixels, canonical_spacing, check_size
from ssl3d.data.scans.streams import check_promise, is_zipped, unzipped
from ssl3d.errors import DataError

_SLAB = 1 << 25  # bytes of voxels that are scaled at a time
_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI's codes of metres and microns; no unit is taken as mm


def read_nifti(files: Sequence[Path], max_voxels: int | None) -> Pixels:
    """Read a NIfTI file, whose frames or colours may lie along a fourth or fifth axis.

    Other formats that nibabel reads are read so too: FreeSurfer's, MINC, Analyze.

    Raises:
        DataError: The voxels are complex, too many, of another number of axes, or without a place; the file
            is cut short, or its check sum does not hold.
    """
    image = _loaded(files[0])
    shape = tuple(int(n) for n in image.shape)
    check_size(shape, max_voxels)
    affine, placed = _affine(image)
    voxels = _voxels(image)
    colours = False
    if voxels.dtype.names:  # RGB is a structured type
        voxels = np.stack([voxels[name] for name in voxels.dtype.names[:3]], axis=-1)
        colours = True
    elif voxels.dtype.kind == "c":
        raise DataError("complex voxels; save the magnitude")
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    vector = voxels.ndim == 5 and voxels.shape[3] == 1  # (I, J, K, 1, C)
    if vector:
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
        vector=vector,
    )


def nifti_spacing(files: Sequence[Path]) -> Triple:
    """Read the spacing (D, H, W) in mm from the header of a NIfTI file.

    Raises:
        DataError: The affine places no volume.
    """
    return canonical_spacing(_affine(_loaded(files[0]))[0])


def pair_of(path: Path) -> Iterator[Path]:
    """Yield the other file of an image in two, NAME.hdr and NAME.img, whether it is there or not."""
    stem, dot, suffix = path.name.removesuffix(".gz").rpartition(".")
    other = {"hdr": "img", "img": "hdr", "HDR": "IMG", "IMG": "HDR"}.get(suffix, "img")
    yield path.with_name(f"{stem}{dot}{other}{path.name[len(stem + dot + suffix) :]}")


def read_pair(files: Sequence[Path], max_voxels: int | None) -> Pixels:
    """Read an image in two files, NIfTI's or Analyze's, by either of them; see `read_nifti`."""
    (other,) = pair_of(files[0])
    if not other.is_file():
        raise DataError(f"{other.name}, the other half of the image, is missing")
    return read_nifti(files, max_voxels)


def _loaded(path: Path) -> Any:
    """Open a file by nibabel, its voxels unread.

    Raises:
        DataError: The file is of values on surfaces.
    """
    import nibabel

    image: Any = nibabel.load(path)
    if isinstance(image, nibabel.Cifti2Image):
        raise DataError(
            "CIFTI: values at points of the brain's surface, not a volume; wb_command -cifti-separate "
            "takes out the volume that it may hold"
        )
    return image


def _voxels(image: Any) -> np.ndarray:
    """Read the voxels of a file, all of which and whose check sum are seen before.

    Raises:
        DataError: The file is damaged, cut short, or goes on behind the voxels.
    """
    from nibabel import MGHImage
    from nibabel.arrayproxy import ArrayProxy

    proxy = image.dataobj
    path = Path(image.file_map["image"].filename)
    if not isinstance(proxy, ArrayProxy):  # MINC: netCDF and HDF5 see by themselves
        if len(proxy.shape) != 3:
            raise DataError(f"MINC of {len(proxy.shape)} axes; expected 3 (mnc2nii converts others)")
        return np.asanyarray(proxy)
    bytes_of_voxels = math.prod(proxy.shape) * proxy.dtype.itemsize
    # Less than a row, slice or the like: a length in the header that is too small leaves more. Only
    # FreeSurfer's go on behind the voxels.
    behind = isinstance(image, MGHImage)
    spare = 1 << 26 if behind else max(bytes_of_voxels // max(proxy.shape) - 1, 0)
    zipped = is_zipped(path)
    check_promise(path, proxy.offset + bytes_of_voxels, zipped, spare)
    scaled = (proxy.slope, proxy.inter) != (1, 0)  # to double precision
    taken = bytes_of_voxels * (zipped or scaled) + 8 * math.prod(proxy.shape) * scaled
    read: Callable[[Any], np.ndarray] = np.asanyarray
    if scaled and not memory.fits(taken):
        read, taken = _by_slabs, 4 * math.prod(proxy.shape) + _SLAB
    memory.check(taken, f"{math.prod(proxy.shape):,} voxels {proxy.shape}: ")
    if not zipped:
        memory.check_mapping(proxy.offset + bytes_of_voxels)
        return read(proxy)
    with unzipped(path, spare) as stream:
        spec = proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter
        return read(ArrayProxy(stream, spec, order=proxy.order))


def _by_slabs(proxy: Any) -> np.ndarray:
    """Read scaled voxels in single precision, and no more than a slab of them in double precision."""
    voxels = np.empty(proxy.shape, np.float32, order=proxy.order)
    axis = max(n for n, length in enumerate(proxy.shape) if length > 1 or n == 0)
    step = max(1, _SLAB // (8 * math.prod(proxy.shape[:axis])))
    with np.errstate(over="ignore"):
        for first in range(0, proxy.shape[axis], step):
            slab: Any = (..., slice(first, first + step), *[slice(None)] * (len(proxy.shape) - axis - 1))
            voxels[slab] = proxy[slab]
    return voxels


def _affine(image: Any) -> tuple[np.ndarray, bool]:
    """Return (i, j, k) to RAS+ mm, and whether the header says where in the patient that is.

    Raises:
        DataError: The affine places no volume.
    """
    import nibabel

    header = image.header
    affine = np.array(image.affine, dtype=np.float64)
    if not isinstance(header, nibabel.Nifti1Header):
        geometry.check_affine(affine)
        if isinstance(header, nibabel.analyze.AnalyzeHeader):  # each program has its own left and right
            return affine, False
        return affine, bool(header["goodRASFlag"]) if isinstance(image, nibabel.MGHImage) else True
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    try:
        geometry.check_affine(affine)
    except DataError:
        if not (sform and qform):
            raise
        affine = np.array(image.get_qform(), dtype=np.float64)  # some tools leave zeros in the sform
        geometry.check_affine(affine)
    affine[:3] *= _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine, bool(sform or qform)
