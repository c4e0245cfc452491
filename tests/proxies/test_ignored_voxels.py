"""No loss or error of a restoring proxy counts a voxel that is to be ignored."""

import numpy as np
import pytest
import torch

from ssl3d import plugins
from ssl3d.api import Record, assemble, one_group, open_data, restoration_error, write_part
from ssl3d.data.store.volume import Volume
from ssl3d_proxies.mae import Blocks, normalise

RESTORING = ("mae", "models_genesis", "context_restoration", "transvw")


def crops(seed=0):
    """Two crops, and voxels to ignore: a corner of the first, all but a corner of the second."""
    x = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
    ignored = torch.zeros(2, 16, 16, 16, dtype=torch.bool)
    ignored[0, :, :9, 7:] = True
    ignored[1] = True
    ignored[1, :12, :12, 4:] = False
    return x, ignored


@pytest.fixture
def proxy_of(small, tiny_encoder):
    """Makes a restoring proxy whose decoder gives what it is told, whatever it sees."""

    def make(name, answer, **options):
        torch.manual_seed(0)
        config = small(name)
        for option, value in {"flip": 0.0, **options}.items():
            setattr(config, option, value)
        proxy = plugins.load(plugins.PROXIES, name)(config, tiny_encoder()).train()
        proxy.decoder.forward = lambda maps, size: answer
        return proxy

    return make


def step(proxy, x, ignored=None):
    """Loss and metrics of a step on these crops."""
    batch = {"crop": x, "foreground": torch.ones_like(x[:, 0], dtype=torch.bool)}
    if ignored is not None:
        batch |= {"ignored": ignored, "foreground": ~ignored}
    batch |= {"word": torch.zeros(len(x), dtype=torch.int64), "index": torch.arange(len(x))}
    output = proxy(batch, one_group(3, len(x)))
    return output.loss.detach(), output.metrics


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in RESTORING), ("mae", {"masking": "token", "norm_targets": True})],
)
def test_what_lies_under_the_mask_changes_no_loss(proxy_of, name, options):
    """With a given answer the loss is the same whatever is ignored, and another without a mask."""
    x, ignored = crops()
    other = torch.where(ignored.unsqueeze(1), torch.full_like(x, 7.5), x)
    answer = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    options = options | ({"word_weight": 0.0} if name == "transvw" else {})
    proxy = proxy_of(name, answer, **options)
    (loss, metrics), (again, measured) = step(proxy, x, ignored), step(proxy, other, ignored)
    torch.testing.assert_close(loss, again)
    assert abs(step(proxy, x)[0] - step(proxy, other)[0]) > 0.01 * loss
    if name in ("mae", "models_genesis"):  # what is damaged there is another with the range or the places
        key = "relative_error" if name == "mae" else "flat_error"
        assert measured[key].isfinite()
    changed = torch.where(ignored.unsqueeze(1), answer + 100, answer)
    proxy.decoder.forward = lambda maps, size: changed
    torch.testing.assert_close(step(proxy, x, ignored)[0], loss)
    assert loss > 0 and metrics


def test_the_error_is_that_of_the_counted_voxels_by_numpy():
    """Range, loss, relative and flat error are numpy's over the voxels that count."""
    x, ignored = crops()
    x = x * 4
    spoilt, restored = x + torch.randn_like(x), x + 0.3 * torch.randn_like(x)
    error = restoration_error(restored, spoilt, x, ~ignored.unsqueeze(1))
    squares, copied, flat = [], [], []
    for i in range(2):
        keep = ~ignored[i].numpy()
        own, made, seen = (each[i, 0].numpy().astype(float)[keep] for each in (x, restored, spoilt))
        scale = max(np.ptp(own), 1)
        squares += [((made - own) / scale) ** 2]
        copied += [((seen - own) / scale) ** 2]
        flat += [((own - own.mean()) / scale) ** 2]
    means = [np.concatenate(each).mean() for each in (squares, copied, flat)]
    assert error.loss.item() == pytest.approx(means[0], rel=1e-5)
    assert error.relative.item() == pytest.approx(means[0] / means[1], rel=1e-5)
    assert error.flat.item() == pytest.approx(means[2] / means[1], rel=1e-5)


def test_a_block_is_standardised_by_what_counts_in_it():
    """Mean and deviation of a block are numpy's over its counted voxels."""
    x, ignored = crops()
    blocks = Blocks.of((16, 16, 16), (8, 8, 8))
    got = normalise(x, blocks, ~ignored.unsqueeze(1))[0, 0, :8, 8:, :8].numpy()
    block, keep = x[0, 0, :8, 8:, :8].numpy().astype(float), ~ignored[0, :8, 8:, :8].numpy()
    expected = (block - block[keep].mean()) / np.sqrt(block[keep].var() + 1e-6)
    assert 0 < keep.mean() < 1
    np.testing.assert_allclose(got[keep], expected[keep], rtol=1e-4, atol=1e-5)


@pytest.fixture
def volume(tmp_path):
    """A volume of which one half is to be ignored, and one of which nothing is."""
    rng = np.random.default_rng(0)
    ignored = np.zeros((48, 48, 48), bool)
    ignored[:, 20:] = True
    for name, own in (("a", ignored), ("b", None)):
        image = rng.normal(5, 1, (1, 48, 48, 48)).astype(np.float32)
        write_part(tmp_path / "p", name, Record(name, "made", name), image,
                   foreground=np.ones((48, 48, 48), bool), ignored=own)  # fmt: skip
    assemble(tmp_path / "p", tmp_path / "s.h5", {}, [])
    return open_data([tmp_path / "s.h5"])


@pytest.mark.parametrize("name", [*RESTORING, "cube_ordering", "sorting"])
def test_draws_keep_off_ignored_centres(volume, small, name, monkeypatch):
    """What is drawn tells what to ignore, alike for all volumes of a store; no crop has such a centre."""
    proxy, config = plugins.load(plugins.PROXIES, name), small(name)
    config.min_foreground = 0.0
    if name == "sorting":
        config.field = "crop"
    places, real = [], Volume.read

    def spy(self, start=None, size=None):
        places.append((self.id, np.array(start) + np.array(size) // 2))
        return real(self, start, size)

    monkeypatch.setattr(Volume, "read", spy)
    for seed in range(12):
        drawn = [proxy.draw(config, each, np.random.default_rng(seed)) for each in volume]
        assert drawn[0].keys() == drawn[1].keys()
        assert ("ignored" in drawn[0]) == (name in RESTORING)
        if name in RESTORING:
            assert drawn[0]["ignored"].shape == drawn[0]["crop"].shape[1:] and not drawn[1]["ignored"].any()
    if name != "cube_ordering":  # of its cubes below
        assert all(at[1] < 20 for who, at in places if who == "a")
        assert any(at[1] >= 20 for who, at in places if who == "b")
        return
    filled = np.stack(
        [
            drawn["filled"].numpy()
            for drawn in [proxy.draw(config, volume[0], np.random.default_rng(i)) for i in range(12)]
        ]
    )
    assert not filled.all() and filled.any()
