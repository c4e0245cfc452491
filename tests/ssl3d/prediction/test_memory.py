"""How much memory a prediction holds: no more than a window's slices of image and probabilities."""

import itertools

import torch

from ssl3d.api import predict_slabs, predict_windows


def test_slabs_are_those_of_the_whole_to_the_last_bit_and_few_slices_are_held():
    torch.manual_seed(0)
    image, network = torch.randn(2, 37, 14, 9), torch.nn.Conv3d(2, 3, 3, padding=1)
    reads, held = [], []

    def read(first, depth):
        reads.append((first, depth))
        return image[:, first : first + depth]

    for window, batch in itertools.product(((8, 6, 5), (1, 14, 9), (64, 64, 64), (37, 3, 3)), (1, 3, 50)):
        reads.clear()
        slabs = predict_slabs(network, read, image.shape[1:], window, 0.5, batch, (0, 2))
        parts = []
        for slab in slabs:
            parts.append(slab)
            held.append(slab.shape[1])
        whole = predict_windows(network, image, window, 0.5, 1 if batch == 1 else batch, (0, 2))
        assert torch.equal(torch.cat(parts, dim=1), whole)
        assert [first for first, _ in reads] == sorted({first for first, _ in reads})  # each place once
        assert all(depth <= min(window[0], 37) for _, depth in reads)
        if window[0] == 8 and batch == 1:
            assert max(part.shape[1] for part in parts) <= 8
