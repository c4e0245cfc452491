"""EfficientNet-Lite0 in 2D, with the parameter names of efficientnet-lite-pytorch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ssl3d.convert.folding import same_pads

# Expansion, channels, blocks, kernel, stride (Liu et al., EfficientNet-Lite, 2020: B0 without squeeze and
# excitation, ReLU6 instead of swish, stem and head of fixed width).
_STAGES = (
    (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2), (6, 320, 1, 3, 1),
)  # fmt: skip


class Conv2dSame(nn.Conv2d):
    """Convolution padded as TensorFlow's SAME, by the image's size; `to_3d` knows it by timm's name."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        height, width = (
            same_pads(x.shape[2 + n], self.kernel_size[n], self.stride[n], self.dilation[n]) for n in (0, 1)
        )
        return self._conv_forward(F.pad(x, (*width, *height)), self.weight, self.bias)


class Block(nn.Module):
    """Inverted residual block of EfficientNet-Lite."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        width = channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(channels, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = _conv(width, width, kernel, stride, width)
        self._bn1 = _norm(width)
        self._project_conv = nn.Conv2d(width, out, 1, bias=False)
        self._bn2 = _norm(out)
        self.widens, self.residual = expansion > 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, channels, H, W) to (B, out, ...)."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, with the weights' own padding, TensorFlow's: they were trained there."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self._conv_stem = _conv(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for expansion, out, count, kernel, stride in _STAGES:
            for n in range(count):
                blocks.append(Block(channels, out, expansion, kernel, stride if n == 0 else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Score the classes (B, num_classes) of (B, 3, H, W)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(F.dropout(x.mean((2, 3)), 0.2, self.training))


def _conv(channels: int, out: int, kernel: int, stride: int, groups: int = 1) -> nn.Conv2d:
    return Conv2dSame(channels, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
