import pytest
import torch

from ssl3d.heads.projection import projection_head


def layers(head):
    return [(type(m).__name__, getattr(m, "bias", None) is not None) for m in head.layers]


def test_the_default_head_is_lightlys_for_simclr():
    from lightly.models.modules import SimCLRProjectionHead

    assert layers(projection_head(16, 32, 8)) == layers(SimCLRProjectionHead(16, 32, 8))
    plain = SimCLRProjectionHead(16, 32, 8, batch_norm=False)
    assert layers(projection_head(16, 32, 8, norm="none")) == layers(plain)


def test_three_layers_without_a_last_norm_are_lightlys_for_barlow_twins():
    from lightly.models.modules import BarlowTwinsProjectionHead

    mine = projection_head(16, 32, 8, layers=3, norm_last=False)
    assert layers(mine) == layers(BarlowTwinsProjectionHead(16, 32, 8))


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_without_batch_norm_every_example_stands_alone(norm):
    head = projection_head(16, 32, 8, norm=norm)
    x = torch.randn(4, 16)
    assert torch.allclose(head(x)[:1], head(x[:1]), atol=1e-6)


def test_unknown_norms_and_no_layers_are_refused():
    with pytest.raises(ValueError, match="norm must be one of batch, layer, none, not 'btach'"):
        projection_head(16, 32, 8, norm="btach")
    with pytest.raises(ValueError, match="layers"):
        projection_head(16, 32, 8, layers=0)
