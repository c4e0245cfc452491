"""Predictions as files for others: masks in the scan's own grid, probabilities, boxes."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.data.geometry import regrid, save_nifti
from ssl3d.data.scans.itk import quiet_sitk
from ssl3d.data.scans.read import format_by_suffix, suffix_of
from ssl3d.model import MaskPrediction, best_class
from ssl3d.segmentation.save import save_original, to_original

Array = NDArray[Any]


def write_mask(
    prediction: MaskPrediction,
    volume: Any,
    name: str,
    scratch: Path,
    *,
    probabilities: bool = False,
    own_format: bool = False,
) -> tuple[list[Path], Array | None, dict[str, float]]:
    """Write the mask of a volume, and the probabilities of its classes if asked for.

    The files lie in the scratch folder; they are whole, and may be moved to their place. Of a scan that was
    resampled, the probabilities are interpolated on its own grid before the most probable class is taken.

    Args:
        prediction: Prediction, whose slabs are read.
        volume: Volume of a store.
        name: Name of the files, without suffix.
        scratch: Folder to write into.
        probabilities: Whether to write the probabilities too.
        own_format: Whether to write the scan's own format, where that is NRRD or MetaImage.

    Returns:
        Files; mask values (I, J, K) on the scan's own grid, None where that is not known; and the volume of
        each class but the first, in ml.
    """
    record = volume.record
    values = np.array(prediction.values)
    values = values.astype(np.min_scalar_type(int(values.max())))
    mask = np.empty(prediction.shape, values.dtype)
    resampled = isinstance(record.done.get("resampled"), dict)
    kept = scratch / "probabilities.f16"
    with kept.open("wb") if probabilities or resampled else contextlib.nullcontext() as stored:
        first = 0
        for slab in prediction.slabs:
            end = first + slab.shape[1]
            mask[first:end] = values[best_class(slab).cpu().numpy()]
            if stored is not None:
                _put(stored, slab.cpu().numpy().astype(np.float16), first, prediction.shape)
            first = end
    restored = to_original(record, mask)
    if restored is not None and resampled:
        _most_probable(restored, record, kept, mask.shape, values)
    files = [_write_labels(record, mask, restored, name, scratch, own_format)]
    if probabilities:
        files.append(_write_probabilities(record, kept, mask.shape, len(values), name, scratch))
    kept.unlink(missing_ok=True)
    side = float(np.prod(volume.spacing)) / 1000
    millilitres = {
        label: round(float((mask == value).sum()) * side, 4)
        for label, value in zip(prediction.names[1:], values[1:], strict=True)
    }
    return files, restored, millilitres


def _most_probable(labels: Array, record: Any, kept: Path, stored: tuple[int, ...], values: Array) -> None:
    """Fill labels (I, J, K) with the most probable values, a class at a time."""
    affine, world = np.array(record.affine), np.array(record.original_affine)
    best = np.full(labels.shape, -1, np.float32)
    for k, value in enumerate(values):
        block = _on_source(_class_of(kept, k, stored), affine, labels.shape, world, float(k == 0), record)
        better = block > best
        labels[better] = value
        np.maximum(best, block, out=best)


def _class_of(kept: Path, k: int, stored: tuple[int, ...]) -> Array:
    """Read the probabilities of a class, (D, H, W) float32."""
    voxels = int(np.prod(stored))
    part = np.fromfile(kept, np.float16, voxels, offset=2 * k * voxels)
    return part.reshape(stored).astype(np.float32)


def _put(file: IO[bytes], slab: Array, first: int, shape: tuple[int, int, int]) -> None:
    """Write a slab (K, d, H, W) at its place in a file of (K, D, H, W).

    Not by a memory map, in which a full disk would end the process.
    """
    plane = shape[1] * shape[2]
    for k, part in enumerate(slab):
        file.seek((k * shape[0] + first) * plane * part.itemsize)
        file.write(part.tobytes())


def _write_labels(
    record: Any, mask: Array, restored: Array | None, name: str, scratch: Path, own_format: bool
) -> Path:
    suffix = suffix_of(Path(record.source.partition("#")[0]))
    form = format_by_suffix(Path(f"x{suffix}"))
    if form is not None and form.kind == "picture" and "#" not in record.source:
        return _write_picture(record, mask, scratch / f"{name}.png")
    if restored is None:
        path = scratch / f"{name}_stored_grid.nii.gz"
        save_nifti(record, (0, 0, 0), mask, path)
        return path
    if own_format and suffix in (".nrrd", ".nhdr", ".mha", ".mhd"):
        path = scratch / f"{name}{'.nrrd' if suffix in ('.nrrd', '.nhdr') else '.mha'}"
        return _write_itk(restored, np.array(record.original_affine), path)
    path = scratch / f"{name}.nii.gz"
    save_original(record, restored, path)
    return path


def _write_picture(record: Any, mask: Array, path: Path) -> Path:
    """Write the mask of a picture as PNG, of the picture's own size."""
    from PIL import Image

    whole = mask[0]
    crop = record.done.get("crop")
    if crop:
        rows, columns = crop["of"][1:]
        whole = np.zeros((rows, columns), mask.dtype)
        top, left = crop["start"][1:]
        whole[top : top + mask.shape[1], left : left + mask.shape[2]] = mask[0]
    Image.fromarray(whole.astype(np.uint8 if whole.max() < 256 else np.int32)).save(path)
    return path


def _write_itk(labels: Array, affine: Array, path: Path) -> Path:
    """Write (I, J, K) with an affine to RAS+ mm in a format of ITK's, whose world is LPS."""
    sitk = quiet_sitk()
    image = sitk.GetImageFromArray(np.ascontiguousarray(labels.T))
    world = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.sqrt((world[:3, :3] ** 2).sum(axis=0))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(world[:3, 3].tolist())
    image.SetDirection((world[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), True)
    return path


def _write_probabilities(
    record: Any, kept: Path, stored: tuple[int, ...], count: int, name: str, scratch: Path
) -> Path:
    """Write the probabilities (K, D, H, W) of a file as NIfTI, float32, class after class on a fourth axis.

    On the scan's own grid they are interpolated linearly; what preparation cropped away is background.
    """
    import nibabel

    source = record.original_affine
    own = to_original(record, np.zeros(stored, np.uint8))
    path = scratch / f"{name}_probabilities{'' if own is not None else '_stored_grid'}.nii.gz"
    affine = np.array(record.affine)
    if own is None:
        shape: tuple[int, ...] = stored[::-1]
        world = affine @ np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
    else:
        shape, world = own.shape, np.array(source)
    image = nibabel.Nifti1Image(np.broadcast_to(np.float32(0), (*shape, count)), world)
    image.header.set_xyzt_units("mm")
    image.header.set_data_dtype(np.float32)
    image.header.set_data_offset(352)
    with gzip.open(path, "wb", compresslevel=1) as file:
        image.header.write_to(file)
        file.write(b"\0" * (352 - file.tell()))
        for k in range(count):  # a class at a time, to save memory
            block = _class_of(kept, k, stored)
            if own is None:
                block = block.T
            else:
                outside = 1.0 if k == 0 else 0.0
                block = _on_source(block, affine, shape, world, outside, record)
            file.write(np.ascontiguousarray(block.T, dtype="<f4").tobytes())
    return path


def _on_source(
    part: Array, affine: Array, shape: tuple[int, ...], world: Array, outside: float, record: Any
) -> Array:
    """Sample a class on the grid of the scan: exactly where both grids agree, else linearly."""
    matrix = np.linalg.inv(affine) @ world
    grid = np.abs(matrix[:3, :3])
    on_voxels = np.allclose(grid, np.rint(grid), atol=1e-4) and np.allclose(grid.sum(axis=0), 1, atol=1e-4)
    if on_voxels and np.allclose(matrix[:3, 3], np.rint(matrix[:3, 3]), atol=1e-3):
        return regrid(part, affine, shape, world, nearest=True, outside=outside)
    return regrid(part, affine, shape, world, outside=outside if "crop" in record.done else None)
