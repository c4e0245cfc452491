"""Masked slices: where the block lies, what lies between its neighbours, and what is predicted."""

import pytest
import torch

from ssl3d.objectives.masked_slices import interpolate_block, mask_block, standardise
from ssl3d.rng import one_group


def test_one_block_of_slices_is_masked():
    mask = mask_block(one_group(0, 500), 20, (0.1, 0.3))
    lengths = mask.sum(1)
    assert lengths.min() == 2 and lengths.max() == 6
    assert ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]).max() == 1  # a single block
    assert mask.float().mean(0).min() > 0.03  # anywhere
    assert (mask_block(one_group(0, 50), 2, (0.1, 0.3)).sum(1) == 1).all()
    assert (mask_block(one_group(0, 50), 3, (0.9, 0.95)).sum(1) == 2).all()  # never all


def test_interpolation_of_the_neighbours_by_hand():
    x = torch.tensor([10.0, 20, 30, 70, 90])[None, :, None]

    def between(*masked):
        mask = torch.zeros(1, 5, dtype=torch.bool)
        mask[0, list(masked)] = True
        return interpolate_block(x, mask)[mask][:, 0].tolist()

    assert between(2) == pytest.approx([45])
    assert between(1, 2) == pytest.approx([30, 50])
    assert between(0, 1) == [30, 30]
    assert between(3, 4) == [30, 30]


def test_targets_are_standardised_over_all_groups():
    a, b = torch.randn(3, 2, 5, 4) * 7 + 3, torch.randn(2, 2, 3, 4) * 7 + 3
    flat = torch.cat([x.flatten(0, 2) for x in standardise([a, b], a)])
    assert torch.allclose(flat.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(flat.std(0, correction=0), torch.ones(4), atol=2e-3)


def test_no_gradient_runs_through_the_targets():
    x = torch.randn(2, 2, 6, 8, requires_grad=True)
    assert not standardise([x], x)[0].requires_grad
