"""The contract of an encoder, tested on any class that claims to be one."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d import plugins
from ssl3d.encoder import Encoder
from ssl3d.encoders import to_memory_format
from ssl3d.encoders.convolutions import Convolution
from ssl3d.errors import UsageError


def dead_taps(module: nn.Module) -> list[str]:
    """List the kernel taps and parameters that no gradient has reached; call it after a backward pass.

    A tap is one place of a kernel, all its channels together: the gradient of an off-plane tap is zero
    where the kernel sees slices of depth 1 only.

    Args:
        module: Encoder, proxy, or any other module with parameters.

    Returns:
        One line each, as in `conv1.weight[:, :, 0, :, :]`; empty if every trainable parameter has a
        gradient and every tap of every kernel has one that is not zero.

    Example:
        >>> layer = nn.Conv3d(1, 1, (3, 1, 1), padding=(1, 0, 0))
        >>> layer(torch.ones(1, 1, 1, 4, 4)).sum().backward()  # meets the middle of the kernel alone
        >>> dead_taps(layer)
        ['weight[:, :, 0, :, :]', 'weight[:, :, 2, :, :]']
    """
    dead = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            dead.append(f"{name} (no gradient)")
            continue
        gradient = parameter.grad
        if parameter.ndim < 3:
            if not gradient.any():
                dead.append(f"{name} (gradient zero)")
            continue
        reached = gradient.ne(0).any(dim=0).any(dim=0)
        if not reached.any():
            dead.append(f"{name} (gradient zero)")
            continue
        dead += [f"{name}[:, :, {place}]" for place in _places(reached)]
    return dead


def _places(reached: Tensor) -> list[str]:
    """List the places that are False, whole planes first."""
    places = []
    left = ~reached
    for axis in range(left.ndim):
        for k in range(left.shape[axis]):
            plane = left.select(axis, k)
            if left.ndim > 1 and plane.all() and not reached.select(axis, k).any():
                places.append(", ".join(str(k) if a == axis else ":" for a in range(left.ndim)))
    shown = left.clone()
    for axis in range(left.ndim):
        others = [a for a in range(left.ndim) if a != axis]
        if others:
            shown &= ~(~reached.any(dim=others)).view([-1 if a == axis else 1 for a in range(left.ndim)])
    return places + [", ".join(map(str, place)) for place in shown.nonzero().tolist()]


def check_encoder(encoder: str | Path | type[Encoder], config: Any = None) -> None:
    """Test that an encoder keeps the contract of `ssl3d.api.Encoder`.

    - It takes depths of 1, 2, odd and even, 1 and 3 input channels, and volumes smaller than its strides,
      unless it refuses these with a UsageError.
    - `channels`, `strides` and `embed_dim` are true of its feature maps.
    - The embedding of a volume does not depend on its batch, nor on what the encoder saw before.
    - A gradient reaches every parameter and every kernel tap.
    - Copies, pickles and state dicts give the same network; its weights are a function of torch's seed.
    - It stays finite under bfloat16 autocast; the memory format changes nothing but rounding.
    - Activation checkpointing, where the configuration has the switch, leaves the gradients as they are.

    Args:
        encoder: Registered name, file (PATH/file.py or PATH/file.py:Class), module:Class, or class.
        config: Configuration of the encoder; None takes the default one. Small ones are tested faster.

    Raises:
        AssertionError: The contract is broken; the message says how.
        PluginError: There is no such plugin, or it does not import.

    Example:
        >>> from ssl3d.encoders.resnet import ResNet10
        >>> check_encoder(ResNet10, ResNet10.Config(width=4))
    """
    cls = encoder if isinstance(encoder, type) else plugins.find(plugins.ENCODERS, str(encoder))[1]
    config = cls.Config() if config is None else config
    with torch.random.fork_rng(devices=[]):
        for channels in {1, 3, config.in_channels}:
            network = _make(cls, dataclasses.replace(config, in_channels=channels))
            _check_maps(network, channels, every_depth=channels == config.in_channels)
        network = _make(cls, config)
        _check_seed(network, cls, config)
        _check_inference(network, config.in_channels)
        _check_tiny(network, config.in_channels)
        _check_layouts(network, config.in_channels)
        _check_copies(network, cls, config)
        _check_autocast(network, config.in_channels)
        _check_gradients(network, config.in_channels)
        if hasattr(config, "checkpointing"):
            _check_checkpointing(cls, config)


def _make(cls: type[Encoder], config: Any) -> Encoder:
    torch.manual_seed(0)
    return cls(config)


def _sizes(encoder: Encoder) -> tuple[int, int, int]:
    """Choose an odd size whose deepest map is so wide that no tap, dilated or not, sees only zeros."""
    deepest = encoder.strides[-1]
    gaps = [module.dilation for module in encoder.modules() if isinstance(module, Convolution)]
    wide = max((max(gap) for gap in gaps), default=1) + 1
    return (wide * deepest[0] + 1, wide * deepest[1] + 3, wide * deepest[2] + 1)


def _volumes(encoder: Encoder, channels: int, batch: int = 2, depth: int | None = None) -> Tensor:
    d, h, w = _sizes(encoder)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, d if depth is None else depth, h, w, generator=generator)


def _check_maps(encoder: Encoder, channels: int, every_depth: bool) -> None:
    who = type(encoder).__name__
    assert isinstance(encoder, Encoder), f"{who} is not an ssl3d Encoder"
    assert len(encoder.channels) == len(encoder.strides), (
        f"{who}: {len(encoder.channels)} channels but {len(encoder.strides)} strides"
    )
    assert all(len(stride) == 3 for stride in encoder.strides), f"{who}: a stride is not (D, H, W)"
    encoder.eval()
    for depth in (1, 2, 3, 8, None) if every_depth else (1, 5):
        x = _volumes(encoder, channels, depth=depth)
        before = x.clone()
        with torch.no_grad():
            maps, embedding = encoder(x), encoder.embed(x)
            pooled = encoder.pool(maps)
        assert torch.equal(x, before), f"{who}: forward changes its input (an activation in place?)"
        assert len(maps) == len(encoder.channels), (
            f"{who}: {len(maps)} feature maps, but channels names {len(encoder.channels)}"
        )
        for n, (map_, width, stride) in enumerate(
            zip(maps, encoder.channels, encoder.strides, strict=True)
        ):
            space = tuple(-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True))
            expected = (len(x), width, *space)
            assert tuple(map_.shape) == expected, (
                f"{who}: map {n} of an input {tuple(x.shape)} has shape {tuple(map_.shape)}; "
                f"channels and strides promise {expected}"
            )
        assert tuple(embedding.shape) == (len(x), encoder.embed_dim), (
            f"{who}: embed gives {tuple(embedding.shape)}, embed_dim is {encoder.embed_dim}"
        )
        assert torch.allclose(embedding, pooled, atol=1e-5, rtol=1e-4), f"{who}: embed is not pool(forward)"
        assert bool(embedding.isfinite().all()), f"{who}: an embedding at depth {x.shape[2]} is not finite"


def _check_seed(encoder: Encoder, cls: type[Encoder], config: Any) -> None:
    again = _make(cls, config).state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, again[name]), f"{cls.__name__}: {name} is not a function of torch's seed"


def _check_inference(encoder: Encoder, channels: int) -> None:
    who = type(encoder).__name__
    encoder.eval()
    with torch.no_grad():
        for depth in (1, 3):
            x = _volumes(encoder, channels, batch=3, depth=depth)
            together = encoder.embed(x)
            assert torch.equal(together, encoder.embed(x)), f"{who}: eval mode is not deterministic"
            apart = torch.cat([encoder.embed(row) for row in x.split(1)])
            scale = together.abs().max()
            assert torch.allclose(together, apart, atol=1e-4 * float(scale), rtol=1e-3), (
                f"{who}: in eval mode an embedding depends on the rest of its batch (depth {depth})"
            )
            encoder.embed(_volumes(encoder, channels, depth=4 - depth))
            assert torch.equal(together, encoder.embed(x)), (
                f"{who}: an embedding at depth {depth} depends on the depth the encoder saw before"
            )


def _check_tiny(encoder: Encoder, channels: int) -> None:
    who = type(encoder).__name__
    encoder.eval()
    for size in ((1, 1, 1), (2, 1, 3), (3, 5, 2)):
        x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                maps = encoder(x)
        except UsageError:  # said in one line that it cannot be, as an instance norm of one voxel
            continue
        for n, (map_, stride) in enumerate(zip(maps, encoder.strides, strict=True)):
            space = tuple(-(-length // step) for length, step in zip(size, stride, strict=True))
            assert tuple(map_.shape[2:]) == space and bool(map_.isfinite().all()), (
                f"{who}: map {n} of a volume of {size} voxels has {tuple(map_.shape[2:])}, not {space}, "
                "or is not finite"
            )


def _check_layouts(encoder: Encoder, channels: int) -> None:
    encoder.eval()
    for depth in (1, 3):
        x = _volumes(encoder, channels, depth=depth).double()
        by_layout = []
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            other = to_memory_format(copy.deepcopy(encoder).double(), layout)
            with torch.no_grad():
                by_layout.append(other(x.contiguous(memory_format=layout)))
        for n, (first, last) in enumerate(zip(*by_layout, strict=True)):
            assert torch.allclose(first, last, atol=1e-6 * float(first.abs().max()), rtol=1e-5), (
                f"{type(encoder).__name__}: map {n} at depth {depth} depends on the memory format"
            )


def _check_copies(encoder: Encoder, cls: type[Encoder], config: Any) -> None:
    who = type(encoder).__name__
    encoder.eval()
    x = _volumes(encoder, config.in_channels)
    with torch.no_grad():
        expected = encoder.embed(x)
        torch.manual_seed(2)
        loaded = cls(config)
        file = io.BytesIO()
        torch.save(encoder.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        copies = {
            "deepcopy": copy.deepcopy(encoder),
            "pickle": pickle.loads(pickle.dumps(encoder)),
            "state_dict": loaded.eval(),
        }
        for how, other in copies.items():
            assert torch.equal(expected, other.embed(x)), f"{who}: {how} gives another network"


def _check_autocast(encoder: Encoder, channels: int) -> None:
    encoder.train()
    x = _volumes(encoder, channels)
    with torch.autocast(x.device.type, torch.bfloat16):
        maps = encoder(x)
    sum(map_.float().square().mean() for map_ in maps).backward()
    for n, map_ in enumerate(maps):
        assert bool(map_.isfinite().all()), f"{type(encoder).__name__}: map {n} is not finite in bfloat16"
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), (
            f"{type(encoder).__name__}: the gradient of {name} is not finite in bfloat16"
        )


def _gradients(encoder: Encoder, x: Tensor) -> None:
    encoder.train()
    encoder.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(3)
    loss = x.new_zeros(())
    for map_ in encoder(x):
        loss = loss + (map_ * torch.randn(map_.shape, generator=generator)).mean()
    loss.backward()


def _check_gradients(encoder: Encoder, channels: int) -> None:
    who = type(encoder).__name__
    x = _volumes(encoder, channels)
    _gradients(encoder, x)
    dead = dead_taps(encoder)
    assert not dead, f"{who}: no gradient on an input {tuple(x.shape)} reaches {_some(dead)}"
    _gradients(encoder, _volumes(encoder, channels, depth=1))
    dead = [name for name in dead_taps(encoder) if name.endswith(")")]
    assert not dead, f"{who}: no gradient on an input of depth 1 reaches {_some(dead)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_checkpointing(cls: type[Encoder], config: Any) -> None:
    for depth in (1, 3):
        seen = []
        for checkpointing in (False, True):
            encoder = _make(cls, dataclasses.replace(config, checkpointing=checkpointing))
            _gradients(encoder, _volumes(encoder, config.in_channels, depth=depth))
            seen.append(encoder)
        plain, recomputed = seen
        for (name, weight), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
            assert weight.grad is not None and other.grad is not None
            assert torch.allclose(
                weight.grad, other.grad, atol=1e-6 + 1e-4 * float(weight.grad.abs().max())
            ), f"{cls.__name__}: the gradient of {name} at depth {depth} changes with checkpointing"
        for (name, before), after in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
            assert torch.allclose(before, after), f"{cls.__name__}: {name} changes with checkpointing"
