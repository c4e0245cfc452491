"""Scans of a MONAI bundle: intensities before the network, windows over it, mask values after it.

A bundle holds this file as `scripts/scans.py`, beside the files of ssl3d that it imports.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import Tensor, nn

from ssl3d.data.preparation.normalize import foreground, normalize
from ssl3d.segmentation.windows import predict_windows


class Intensitiesd(MapTransform):
    """Normalise scans (C, X, Y, Z) as the training data were, and refuse spacings that those never had.

    Args:
        keys: Keys of the scans.
        kind: Kind of normalisation.
        low: Lowest spacing (X, Y, Z) in mm.
        high: Highest spacing (X, Y, Z) in mm.
    """

    def __init__(
        self, keys: KeysCollection, kind: str, low: Sequence[float], high: Sequence[float]
    ) -> None:
        super().__init__(keys)
        self.kind, self.low, self.high = kind, low, high

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Normalise each scan, rounded to half precision as ssl3d stores it."""
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key]
            own = [float(side) for side in image.pixdim]
            if not all(
                low <= side <= high for low, side, high in zip(self.low, own, self.high, strict=True)
            ):
                raise ValueError(
                    f"voxels of {own} mm; the model was trained on {list(self.low)} to {list(self.high)} mm"
                )
            voxels = np.ascontiguousarray(np.asarray(image, np.float32).transpose(0, 3, 2, 1))
            computed, how = normalize(voxels, self.kind, foreground(voxels, self.kind))
            rounded = torch.from_numpy(computed.astype(np.float16).astype(np.float32))
            meta = {
                **image.meta,
                "background": np.asarray(how["background"], np.float16).astype(np.float32),
            }
            out[key] = MetaTensor(
                rounded.permute(0, 3, 2, 1), meta=meta, applied_operations=image.applied_operations
            )
        return out


class Windows(Inferer):
    """Cover scans (B, C, X, Y, Z) by windows, as ssl3d predict does.

    Args:
        size: Size (D, H, W) of a window.
        overlap: Share of a window that the next one covers too.
        batch: Number of windows at a time.
    """

    def __init__(self, size: Sequence[int], overlap: float, batch: int) -> None:
        super().__init__()
        self.size, self.overlap, self.batch = size, overlap, batch

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Predict the probabilities (B, K, X, Y, Z)."""
        meta = getattr(inputs, "meta", {})
        air = torch.as_tensor(meta.get("background", 0.0), dtype=torch.float32).reshape(-1)
        parts = []
        for image in torch.as_tensor(inputs).permute(0, 1, 4, 3, 2):
            size = [1 if image.shape[1] == 1 else self.size[0], *self.size[1:]]
            short = [max(side - length, 0) for side, length in zip(size, image.shape[1:], strict=True)]
            wide = (
                air.to(image)
                .view(-1, 1, 1, 1)
                .expand(image.shape[0], *(n + s for n, s in zip(image.shape[1:], short, strict=True)))
            )
            whole = wide.clone()
            place = [slice(s // 2, s // 2 + n) for n, s in zip(image.shape[1:], short, strict=True)]
            whole[:, place[0], place[1], place[2]] = torch.Tensor(image.as_subclass(torch.Tensor))
            computed = predict_windows(network, whole, size, self.overlap, self.batch)
            parts.append(computed[:, place[0], place[1], place[2]].permute(0, 3, 2, 1))
        return torch.stack(parts)


class Program(nn.Module):
    """Program of torch.export on a device, as a network whose mode can be set.

    Args:
        path: File of the program.
        device: Device that computes.
    """

    def __init__(self, path: str, device: Any = "cpu") -> None:
        super().__init__()
        from torch.export.passes import move_to_device_pass

        program = torch.export.load(path)
        if torch.device(device).type != "cpu":
            program = move_to_device_pass(program, device)
        self._module = [program.module()]  # no submodule: it has no `eval`

    def forward(self, x: Tensor) -> Tensor:
        """Compute the probabilities (B, K, D, H, W) of windows (B, C, D, H, W)."""
        out: Tensor = self._module[0](x)
        return out


class MaskValuesd(MapTransform):
    """Turn probabilities (K, X, Y, Z) into the most probable class's mask value (1, X, Y, Z).

    Args:
        keys: Keys of the probabilities.
        values: Mask value of each class.
        like: Key of the scan, whose place and name the mask has.
    """

    def __init__(self, keys: KeysCollection, values: Sequence[int], like: str = "image") -> None:
        super().__init__(keys)
        self.values, self.like = values, like

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Choose the value of each voxel."""
        out = dict(data)
        for key in self.key_iterator(out):
            best = torch.as_tensor(out[key]).argmax(dim=0, keepdim=True)
            scan = out[self.like]
            out[key] = MetaTensor(
                torch.as_tensor(self.values, device=best.device)[best.as_subclass(torch.Tensor)].float(),
                meta=scan.meta,
                applied_operations=scan.applied_operations,
            )
        return out
