"""The Swin is MONAI's where MONAI is right, and takes images, slabs and odd sizes."""

import importlib.util
import sys

import pytest
import torch

from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.encoders.swin import Swin, SwinConfig, relative_index
from ssl3d.errors import PluginError
from ssl3d.testing import check_encoder

needs_monai = pytest.mark.skipif(
    importlib.util.find_spec("monai") is None,
    reason="MONAI is not installed (pip install 'ssl3d[transformers]')",
)


def small(**options):
    torch.manual_seed(0)
    return Swin(SwinConfig(**{"width": 6, "window": (2, 2, 2), **options})).eval()


@needs_monai
@pytest.mark.parametrize(
    "config",
    [
        SwinConfig(width=4, window=(2, 3, 3), patch=(1, 2, 1), depths=(1, 2, 1, 1), checkpointing=True),
    ],
)
def test_windows_patches_and_checkpointing_keep_the_contract(config):
    check_encoder("swin", config)


@needs_monai
@pytest.mark.parametrize("merging", ["mergingv2", "merging"])
@pytest.mark.parametrize("size,window", [((32, 32, 64), (2, 2, 2)), ((32, 64, 96), (3, 4, 3))])
def test_maps_are_monais(merging, size, window):
    """Even sizes, and maps of at least a window along H and W: the last window's padding included."""
    net = small(merging=merging, window=window)
    x = torch.randn(1, 1, *size)
    with torch.no_grad():
        for ours, theirs in zip(net(x), net.swinViT(x), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@needs_monai
def test_names_are_swinunetrs():
    from monai.networks.nets import SwinUNETR

    theirs = SwinUNETR(1, 2, feature_size=12, spatial_dims=3).swinViT.state_dict()
    net = Swin(SwinConfig(width=12, window=(7, 7, 7), merging="merging"))
    net.load_state_dict({f"swinViT.{name}": value for name, value in theirs.items()}, strict=True)


@needs_monai
def test_only_maps_smaller_than_a_window_differ_from_monais():
    net, x = small(window=(2, 4, 4)), torch.randn(1, 1, 32, 64, 32)
    with torch.no_grad():
        same = [
            torch.allclose(ours, theirs, atol=1e-5)
            for ours, theirs in zip(net(x), net.swinViT(x), strict=True)
        ]
    # The last stage works on 2 x 4 x 2 tokens, 2 of them along W, fewer than a window has.
    assert same == [True, True, True, True, False]


@pytest.mark.parametrize("window", [(3, 3, 3), (1, 3, 3), (2, 1, 3), (2, 2, 2), (3, 2, 1)])
def test_a_bias_is_that_of_the_displacement_in_any_window(window):
    """By hand: the table has a row for every displacement from -2 to 2 along D, H, W, in raster order."""
    rows = {}
    for d in range(-2, 3):
        for h in range(-2, 3):
            for w in range(-2, 3):
                rows[d, h, w] = len(rows)
    places = [(d, h, w) for d in range(window[0]) for h in range(window[1]) for w in range(window[2])]
    index = relative_index(window, (3, 3, 3))
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            assert index[i, j] == rows[a[0] - b[0], a[1] - b[1], a[2] - b[2]]


@needs_monai
def test_windows_see_no_further_than_one_shift():
    """Before any merging a voxel reaches its window and, by the shifted block, the next ones only."""
    net = small(window=(2, 2, 2))
    stage = net.swinViT.layers1[0]
    from ssl3d.encoders.swin import _run

    x = torch.randn(1, 2, 2, 8, 6, requires_grad=True)
    y = x
    for block in stage.blocks:
        y = _run(block, y)
    y[0, 0, 0, 3].sum().backward()
    reached = x.grad[0, 0, 0].abs().sum(-1) > 0
    # Token 3: shifted window {3, 4}, whose windows before are {2, 3} and {4, 5}.
    assert reached.tolist() == [False, False, True, True, True, True, False, False]


@needs_monai
def test_an_image_is_one_slice_deep_at_every_stage():
    net = small()
    with torch.no_grad():
        image, slab = (net(torch.ones(1, 1, depth, 33, 40)) for depth in (1, 2))
    assert [tuple(m.shape[2:]) for m in image] == [(1, 17, 20), (1, 9, 10), (1, 5, 5), (1, 3, 3), (1, 2, 2)]
    for one, two in zip(image, slab, strict=True):  # two equal slices make one token, as one does
        assert torch.allclose(one, two, atol=1e-6)


@needs_monai
def test_dropped_paths_are_of_training_only():
    net = small(drop_path=0.5)
    x = torch.randn(2, 1, 4, 33, 33)
    with torch.no_grad():
        assert torch.equal(net.embed(x), net.embed(x))
        net.train()
        assert not torch.equal(net.embed(x), net.embed(x))


def test_without_monai_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    monkeypatch.setitem(sys.modules, "monai.networks", None)
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(PluginError, match=r"needs MONAI .*pip install 'ssl3d\[transformers\]'") as caught:
        Swin()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options,field",
    [
        ({"width": 0}, "width"),
        ({"heads": 0}, "heads"),
        ({"patch": (2, 2, 0)}, "patch"),
        ({"window": (4, 4)}, "window"),
        ({"depths": (2, 2, 2)}, "depths"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"merging": "v2"}, "merging"),
    ],
)
def test_options_are_checked(options, field):
    with pytest.raises(ValueError, match=field):
        SwinConfig(**options)


@needs_monai
def test_saved_and_loaded_it_is_the_same(tmp_path):
    net = small(patch=(1, 2, 2))
    save_encoder(net, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert isinstance(loaded, Swin) and loaded.config == net.config
    x = torch.randn(1, 1, 3, 17, 16)
    with torch.no_grad():
        assert torch.equal(loaded.embed(x), net.embed(x))
