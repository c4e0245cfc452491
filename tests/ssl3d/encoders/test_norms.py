"""Group norm against torch's, whatever the layout of the memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl3d.encoders.norms import GroupNorm, group_norm, norm, recomputation, recomputing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("space", [(5, 4), (3, 5, 4), (1, 5, 4)])
@pytest.mark.parametrize("last", [True, False])
def test_group_norm_is_torchs_and_keeps_the_layout(space, groups, dtype, last):
    torch.manual_seed(0)
    layout = torch.channels_last if len(space) == 2 else torch.channels_last_3d
    layout = layout if last else torch.contiguous_format
    start = (3 + 2 * torch.randn(2, 6, *space)).to(dtype)
    grad = torch.randn_like(start)
    scale, shift = torch.randn(2, 6)
    found, expected = [], []
    for into, function, x in (
        (found, group_norm, start.contiguous(memory_format=layout)),
        (expected, F.group_norm, start.double()),
    ):
        inputs = [t.to(x.dtype).detach().clone().requires_grad_() for t in (x, scale, shift)]
        y = function(inputs[0], groups, inputs[1], inputs[2], 1e-5)
        y.backward(grad.to(x.dtype))
        into.extend([y, *(tensor.grad for tensor in inputs)])
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.15}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **near)
    assert found[0].is_contiguous(memory_format=layout)
    assert found[0].dtype is dtype


def test_norms_of_a_kind_have_the_keys_of_torchs():
    made = norm("group", 6, 4)
    assert isinstance(made, GroupNorm)
    assert made.num_groups == 2  # what divides 6 and 4
    assert made.state_dict().keys() == nn.GroupNorm(2, 6).state_dict().keys()
    assert norm("instance", 6, 4).num_groups == 6


def test_the_second_pass_can_be_entered_again_and_within_itself():
    again = recomputation()
    for _ in range(2):
        with again:
            with again:
                assert recomputing()
            assert recomputing()
        assert not recomputing()
    with pytest.raises(RuntimeError, match="on purpose"), again:
        raise RuntimeError("on purpose")
    assert not recomputing()
