"""Masked slices: where the block lies, what lies between its neighbours, and what is predicted."""

import pytest
import torch

from ssl3d.objectives.masked_slices import interpolate_masked, mask_block, mask_scattered, standardise
from ssl3d.rng import BatchRng, one_group


def test_one_block_of_slices_is_masked():
    mask = mask_block(one_group(0, 500), 20, (0.1, 0.3))
    lengths = mask.sum(1)
    assert lengths.min() == 2 and lengths.max() == 6
    assert ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]).max() == 1  # a single block
    assert mask.float().mean(0).min() > 0.03  # anywhere
    assert (mask_block(one_group(0, 50), 2, (0.1, 0.3)).sum(1) == 1).all()
    assert (mask_block(one_group(0, 50), 3, (0.9, 0.95)).sum(1) == 2).all()  # never all


def test_scattered_slices_are_masked():
    mask = mask_scattered(one_group(0, 2000), 20, (0.1, 0.3))
    lengths = mask.sum(1)
    assert lengths.min() == 2 and lengths.max() == 6
    assert torch.allclose(mask.float().mean(0), torch.full((20,), 0.2), atol=0.03)  # everywhere alike
    runs = ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]).float()
    assert runs.mean() > 0.75 * lengths.float().mean()
    assert (mask_scattered(one_group(0, 50), 2, (0.1, 0.3)).sum(1) == 1).all()
    assert (mask_scattered(one_group(0, 50), 3, (0.9, 0.95)).sum(1) == 2).all()  # never all
    part = mask_scattered(BatchRng(0, (3, 8), 2000), 20, (0.1, 0.3))
    assert torch.equal(part, mask[[3, 8]])


def test_interpolation_of_the_neighbours_by_hand():
    x = torch.tensor([10.0, 20, 30, 70, 90])[None, :, None]

    def between(*masked):
        mask = torch.zeros(1, 5, dtype=torch.bool)
        mask[0, list(masked)] = True
        return interpolate_masked(x, mask)[mask][:, 0].tolist()

    assert between(2) == pytest.approx([45])
    assert between(1, 2) == pytest.approx([30, 50])
    assert between(0, 1) == [30, 30]
    assert between(3, 4) == [30, 30]
    assert between(0, 2, 4) == [20, 45, 70]  # scattered
    assert between(1, 3) == [20, 60]


def test_targets_are_standardised_over_all_groups():
    a, b = torch.randn(3, 2, 5, 4) * 7 + 3, torch.randn(2, 2, 3, 4) * 7 + 3
    flat = torch.cat([x.flatten(0, 2) for x in standardise([a, b], a)])
    assert torch.allclose(flat.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(flat.std(0, correction=0), torch.ones(4), atol=2e-3)


def test_no_gradient_runs_through_the_targets():
    x = torch.randn(2, 2, 6, 8, requires_grad=True)
    assert not standardise([x], x)[0].requires_grad
