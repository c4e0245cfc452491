"""Small scans of every format, written as other programs write them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

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
            "0020|000d": "1.2.3",
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


def data_folder() -> Path:
    """The shared real data; skips the test where it is missing."""
    import os

    root = Path(os.environ.get("SSL3D_DATA") or Path(__file__).parents[4] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"real data is not at {root} (SSL3D_DATA names the folder)")
    return root


@pytest.fixture
def scans() -> SimpleNamespace:
    """Writers of small scans."""
    return SimpleNamespace(body=body, nifti=nifti, itk=itk, dicom=dicom, placed=placed)


@pytest.fixture
def real_data() -> Path:
    """The folder of the shared real data."""
    return data_folder()
