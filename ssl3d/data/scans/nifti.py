"""NIfTI files, read with nibabel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data import geometry
from ssl3d.data.geometry import CANONICAL, UNKNOWN, Triple
from ssl3d.data.scans.pixels import Pixels, canonical_spacing, check_size
from ssl3d.errors import DataError

_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI's codes of metres and microns; no unit is taken as mm


def read_nifti(files: Sequence[Path], max_voxels: int | None) -> Pixels:
    """Read a NIfTI file, whose frames or colours may lie along a fourth or fifth axis.

    Raises:
        DataError: The voxels are complex, too many, of another number of axes, or without a place.
    """
    import nibabel

    image: Any = nibabel.load(files[0])
    shape = tuple(int(n) for n in image.shape)
    check_size(shape, max_voxels)
    affine, placed = _affine(image)
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


def nifti_spacing(files: Sequence[Path]) -> Triple:
    """Read the spacing (D, H, W) in mm from the header of a NIfTI file.

    Raises:
        DataError: The affine places no volume.
    """
    import nibabel

    return canonical_spacing(_affine(nibabel.load(files[0]))[0])


def _affine(image: Any) -> tuple[np.ndarray, bool]:
    """Return (i, j, k) to RAS+ mm, and whether the header says where in the patient that is.

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
