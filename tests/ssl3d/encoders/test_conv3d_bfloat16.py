"""bfloat16 gradients of convolutions on small maps, where oneDNN's own are garbage."""

import pytest
import torch

from ssl3d.encoders.convolutions import KINDS, conv3d, convolution


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), (2, 4, 3), (5, 1, 3), (4, 1, 2), (3, 3, 1), (1, 2, 2), (6, 7, 8)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_bfloat16_are_those_in_float32(shape, stride):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, *shape, generator=generator)
    weight = torch.randn(32, 32, 3, 3, 3, generator=generator, requires_grad=True)
    found = []
    for half in (False, True):
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = conv3d(x, weight, stride=stride, padding=1)
        y.float().square().sum().backward()
        found.append(weight.grad)
    assert torch.allclose(*found, atol=0.03 * float(found[0].abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_finite_gradients_on_small_maps(kind):
    torch.manual_seed(0)
    layer = convolution(kind, 32, 32, 3)
    for _ in range(3):  # what is read out of bounds varies
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.randn(4, 32, 2, 2, 2), False)
        y.float().square().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() < 1e6 for p in layer.parameters())
