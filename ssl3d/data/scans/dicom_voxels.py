"""DICOM files read into voxels with GDCM: single files, series of slices, and files of many frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data.geometry import Triple
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
from ssl3d.data.scans.dicom_mosaic import is_mosaic, read_mosaics
from ssl3d.data.scans.dicom_pixels import dicom_image, dicom_information
from ssl3d.data.scans.itk import affine_of, image_bytes, pixels_of, quiet_sitk, unplaced_pixels
from ssl3d.data.scans.pixels import Pixels, check_size, placed_pixels
from ssl3d.errors import DataError


def read_dicom(files: Sequence[Path], max_voxels: int | None, header_only: bool = False) -> Pixels:
    """Read a DICOM file, or the files of one series in any order.

    GDCM itself turns MONOCHROME1, whose lowest value is white, into MONOCHROME2.

    Args:
        files: One file, or the slices of a series.
        max_voxels: Largest number of voxels that is not refused.
        header_only: Whether to read the place of the voxels alone, and one voxel instead of them.

    Raises:
        DataError: A header is damaged, or the slices make no even stack.
    """
    tags = {path: dicom_tags(path) for path in files}
    first = tags[files[0]]
    header = dicom_information(files[0])
    each = 0 if header_only else image_bytes(header)
    check_size((*header.GetSize(), header.GetNumberOfComponents(), len(files)), max_voxels, each)
    film = first["modality"] in FILMS  # of several frames: a film, not a volume
    if is_mosaic(files[0], first):
        timed = sorted(
            zip(slices_of(tags), files, strict=True), key=lambda pair: (pair[0].phase, pair[0].key)
        )
        pixels = read_mosaics([path for _, path in timed], header_only)
    elif len(files) > 1:
        pixels = _read_series(tags, header_only)
    elif frame_count(first) > 1 and not film:
        pixels = _read_multiframe(files[0], header, header_only)
    else:
        unplaced = film or not first["axes"]
        pixels = (
            _without_voxels(header, unplaced) if header_only else pixels_of(dicom_image(files[0]), unplaced)
        )
    pixels.modality = first["modality"]
    return pixels


def dicom_spacing(files: Sequence[Path]) -> Triple:
    """Read the spacing (D, H, W) in mm from the headers of a file or a series.

    Raises:
        DataError: A header is damaged, or the slices make no even stack.
    """
    return read_dicom(files, None, header_only=True).spacing


def _read_series(tags: dict[Path, dict[str, str]], header_only: bool) -> Pixels:
    paths, slices = list(tags), slices_of(tags)
    order, place = in_order(slices)
    ordered = [slices[i] for i in order]
    plane = affine_of(dicom_information(paths[order[0]]))[:3, :2]
    affine = stack_affine(ordered, place, plane)
    if header_only:
        return placed_pixels(np.empty((1, 1, 1, 1)), affine, ())
    layers = []
    for path in (paths[i] for i in order):
        image = dicom_image(path)
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
            return _without_voxels(header) if header_only else pixels_of(dicom_image(path))
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
        return placed_pixels(np.empty((1, 1, 1, 1)), affine, ())
    voxels = quiet_sitk().GetArrayFromImage(dicom_image(path))
    if len(set(frames.rescale)) > 1:
        # GDCM rescales all frames as the first.
        slope, intercept = np.array(frames.rescale, dtype=np.float32).T[:, :, None, None]
        stored = (voxels.astype(np.float32) - intercept[0]) / slope[0]
        voxels = stored * slope + intercept
    return _from_slices(voxels[order], ordered, place, affine)


def _from_slices(
    voxels: np.ndarray, ordered: Sequence[Slice], place: np.ndarray, affine: np.ndarray
) -> Pixels:
    """Stack (n, J, I[, C]) voxels that are in order; those at one place become frames."""
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
    pixels = placed_pixels(stack, affine, shape, colours)
    pixels.notes = {"copies": copies} if copies else {}
    return pixels


def _without_copies(voxels: np.ndarray, ordered: Sequence[Slice], place: np.ndarray) -> list[int]:
    """Return the indices of the slices that do not repeat another of the same place and header.

    Raises:
        DataError: Two slices that nothing tells apart hold different voxels.
    """
    keep = [0]
    for i in range(1, len(ordered)):
        here, last = ordered[i], ordered[keep[-1]]
        tied = place[i] == place[keep[-1]] and (here.phase, here.key) == (last.phase, last.key)
        if not tied:
            keep.append(i)
        elif not np.array_equal(voxels[i], voxels[keep[-1]]):
            raise DataError(
                f"{last.name} and {here.name} lie at one place, and nothing else tells their frames apart"
            )
    return keep


def _without_voxels(header: Any, unplaced: bool = False) -> Pixels:
    """Return one voxel at the place that the header of one file tells."""
    nothing = np.empty((1, 1, 1, 1))
    if unplaced:
        return unplaced_pixels(nothing, header, ())
    return placed_pixels(nothing, affine_of(header), ())
