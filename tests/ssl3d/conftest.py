"""Small scans of every format, written as other programs write them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk


def body(shape=(12, 14, 16), seed=0, dtype=np.int16) -> np.ndarray:
    """A soft ball on dark noise, values 0 to about 400."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    ball = np.clip(1.3 - (grid**2).sum(axis=0), 0, None)
    values = 300 * ball + rng.normal(0, 4, shape) + 10 + 20 * np.sin(5 * grid[0])
    return np.clip(values, 0, None).astype(dtype)


def nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """(i, j, k[, frame]) voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def itk(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None, compress: bool = False) -> Path:
    """(i, j, k) voxels and their RAS+ affine, as NRRD or MetaImage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(placed(voxels, affine), str(path), useCompression=compress)
    return path


def placed(voxels: np.ndarray, affine: np.ndarray | None = None) -> sitk.Image:
    """A SimpleITK image (LPS world) of (i, j, k) voxels with a RAS+ affine."""
    lps = np.diag([-1.0, -1, 1, 1]) @ (np.eye(4) if affine is None else affine)
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(axis=0))
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def dicom(
    folder: Path,
    voxels: np.ndarray,
    uid: str,
    affine: np.ndarray | None = None,
    patient: str = "P1",
    modality: str = "MR",
    prefix: str = "s",
    first: int = 0,
    study: str = "1.2.3",
) -> list[Path]:
    """One file per slice along k, names in the reverse of their order in space."""
    folder.mkdir(parents=True, exist_ok=True)
    image = placed(voxels.astype(np.int16), affine)
    direction = image.GetDirection()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    paths = []
    for k in range(image.GetDepth()):
        layer = image[:, :, k]
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        axes = [direction[0], direction[3], direction[6], direction[1], direction[4], direction[7]]
        tags = {
            "0008|0060": modality,
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",
            "0008|0018": f"{uid}.{first + k + 1}",
            "0010|0020": patient,
            "0020|000d": study,
            "0020|000e": uid,
            "0020|0013": str(first + k + 1),
            "0020|0032": "\\".join(f"{v:.6f}" for v in position),
            "0020|0037": "\\".join(f"{v:.6f}" for v in axes),
        }
        for key, value in tags.items():
            layer.SetMetaData(key, value)
        path = folder / f"{prefix}{first + image.GetDepth() - k:03d}.dcm"
        writer.SetFileName(str(path))
        writer.Execute(layer)
        paths.append(path)
    return paths


def raw_dicom(
    path: Path,
    stored: np.ndarray,
    tags: dict[int, tuple[str, Any]],
    photometric: str = "MONOCHROME2",
    bits: int = 0,
    explicit: bool = True,
    lengths: bool = True,
) -> Path:
    """A DICOM file with exactly these stored values and tags, byte by byte; what ITK cannot write.

    Args:
        stored: ([frames, ]rows, columns) of uint8, uint16 or int16.
        tags: (kind, value) by number; value a text, a number, several, or a list of such dicts (SQ).
        photometric: As the values are stored.
        bits: Of each value that are in use, 0 all.
        explicit: Whether every element tells its kind (explicit or implicit VR, little endian).
        lengths: Whether sequences tell their length, or end with a mark.
    """
    rows, columns = stored.shape[-2:]
    allocated = 8 * stored.dtype.itemsize
    bits = bits or allocated
    told = {
        0x00080016: ("UI", "1.2.840.10008.5.1.4.1.1.4"),
        0x00080018: ("UI", f"1.2.3.{zlib.crc32(str(path).encode())}"),
        0x00080060: ("CS", "MR"),
        0x00100020: ("LO", "P1"),
        0x0020000D: ("UI", "1.2.3"),
        0x0020000E: ("UI", "1.2.3.4"),
        0x00280002: ("US", 1),
        0x00280004: ("CS", photometric),
        0x00280010: ("US", rows),
        0x00280011: ("US", columns),
        0x00280030: ("DS", "1\\1"),
        0x00280100: ("US", allocated),
        0x00280101: ("US", bits),
        0x00280102: ("US", bits - 1),
        0x00280103: ("US", int(stored.dtype.kind == "i")),
        **({0x00280008: ("IS", str(len(stored)))} if stored.ndim == 3 else {}),
        **tags,
        0x7FE00010: ("OW", stored.tobytes() + b"\0" * (stored.nbytes % 2)),
    }
    syntax = "1.2.840.10008.1.2.1" if explicit else "1.2.840.10008.1.2"
    meta = _data_set({0x00020002: told[0x00080016], 0x00020010: ("UI", syntax)}, True, True)
    length = _element(0x00020000, "UL", len(meta), True, True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + length + meta + _data_set(told, explicit, lengths))
    return path


def raw_slice(
    path: Path,
    stored: np.ndarray,
    position: Sequence[float],
    tags: dict[int, tuple[str, Any]] | None = None,
    axes: Sequence[float] = (1, 0, 0, 0, 1, 0),
    **options: Any,
) -> Path:
    """One slice of a series: (rows, columns) of stored values at a position (LPS, mm)."""
    place = {0x00200032: ("DS", _decimals(position)), 0x00200037: ("DS", _decimals(axes))}
    return raw_dicom(path, stored, {**place, **(tags or {})}, **options)


def _decimals(values: Sequence[float]) -> str:
    return "\\".join(f"{value:.8g}" for value in values)


def _data_set(tags: dict[int, tuple[str, Any]], explicit: bool, lengths: bool) -> bytes:
    return b"".join(_element(tag, *tags[tag], explicit, lengths) for tag in sorted(tags))


def _element(tag: int, kind: str, value: Any, explicit: bool, lengths: bool) -> bytes:
    if kind == "SQ":
        items = [_data_set(item, explicit, lengths) for item in value]
        if lengths:
            raw = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
        else:
            start, end = (
                struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1),
                struct.pack("<HHI", 0xFFFE, 0xE00D, 0),
            )
            raw = b"".join(start + item + end for item in items) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    elif isinstance(value, bytes):
        raw = value
    elif isinstance(value, str):
        raw = value.encode() + (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    else:
        code = {"US": "H", "UL": "I", "FD": "d", "AT": "H"}[kind]
        values = value if isinstance(value, tuple) else (value,)
        raw = struct.pack(f"<{len(values)}{code}", *values)
    length = 2**32 - 1 if kind == "SQ" and not lengths else len(raw)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if not explicit:
        return head + struct.pack("<I", length) + raw
    if kind in ("OB", "OW", "SQ", "UN"):
        return head + kind.encode() + struct.pack("<HI", 0, length) + raw
    return head + kind.encode() + struct.pack("<H", length) + raw


def data_folder() -> Path:
    """The shared real data; skips the test where it is missing."""
    import os

    root = Path(os.environ.get("SSL3D_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"real data is not at {root} (SSL3D_DATA names the folder)")
    return root


@pytest.fixture
def scans() -> SimpleNamespace:
    """Writers of small scans."""
    return SimpleNamespace(
        body=body,
        nifti=nifti,
        itk=itk,
        dicom=dicom,
        placed=placed,
        raw_dicom=raw_dicom,
        raw_slice=raw_slice,
    )


@pytest.fixture
def real_data() -> Path:
    """The folder of the shared real data."""
    return data_folder()
