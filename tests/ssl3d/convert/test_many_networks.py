"""Every classifier of torchvision and some of timm over volumes: the 2D network's values, or refused."""

import pytest
import torch
import torchvision
from torch import nn

from ssl3d.convert import to_3d
from ssl3d.errors import UsageError

HUGE = (
    "vit_h", "vit_l", "regnet_y_128", "regnet_y_32", "regnet_x_32", "regnet_y_16", "regnet_x_16", "vgg13",
    "vgg16", "vgg19", "convnext_large", "convnext_base", "efficientnet_v2_l", "efficientnet_b6",
    "efficientnet_b7", "resnext101", "wide_resnet101",
)  # fmt: skip
"""Networks that are others here, only wider or deeper, and take gigabytes."""
TORCHVISION = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not any(word in name for word in HUGE)
]
ATTENTIVE = ("vit_", "swin_", "maxvit")
"""Families whose attention mixes voxels, of which nothing is known in 3D."""
TIMM = (
    "resnet18", "resnet18d", "resnet26t", "resnetaa50", "resnetblur18", "ecaresnet26t",
    "ecaresnext26t_32x4d", "seresnet18", "skresnet18", "skresnext50_32x4d", "resnest14d",
    "resnest50d_1s4x24d", "eca_resnet33ts", "seresnet33ts", "resnetv2_50", "res2net50_26w_4s",
    "res2next50", "dla34", "dla46_c", "densenet121", "densenetblur121d", "vovnet39a", "ese_vovnet19b_dw",
    "cspresnet50", "cspdarknet53", "darknet17", "mobilenetv2_100", "mobilenetv3_small_050",
    "mobilenetv4_conv_small", "efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnetv2_b0",
    "efficientnet_lite0", "tinynet_e", "mnasnet_small", "fbnetc_100", "ghostnet_050", "ghostnetv2_100",
    "lcnet_050", "hardcorenas_a", "rexnet_100", "regnetx_002", "regnety_002", "regnetz_b16",
    "convnext_atto", "convnext_femto_ols", "xception41", "repvgg_a0", "mobileone_s0", "fastvit_t8",
    "tresnet_m",
)  # fmt: skip
MIXING = (
    "gcresnext26ts", "nf_resnet26", "botnet26t_256", "halonet26t", "lambda_resnet26t", "convnextv2_atto",
    "edgenext_xx_small", "poolformer_s12", "mobilenetv4_hybrid_medium",
)  # fmt: skip
"""Networks of timm with attention, global response norm or weights that are made in the forward pass."""
QUICK = {
    "resnet18", "mobilenet_v2", "timm/resnetblur18", "timm/ecaresnet26t", "timm/resnest14d",
    "timm/gcresnext26ts",
}  # fmt: skip
NAMES = [*TORCHVISION, *(f"timm/{name}" for name in (*TIMM, *MIXING))]


def network(name):
    torch.manual_seed(0)
    if name.startswith("timm/"):
        net = pytest.importorskip("timm").create_model(name.removeprefix("timm/"))
    else:
        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        net = torchvision.models.get_model(name, weights=None, **quick)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
@torch.no_grad()
def test_a_network_is_itself_on_images_and_equal_slices_or_is_refused(name):
    net = network(name)
    attentive = name.startswith(ATTENTIVE) or name.removeprefix("timm/") in MIXING
    if attentive:
        with pytest.raises(UsageError, match=r"^to_3d: "):
            to_3d(net)
        return
    x = torch.randn(2, 3, *(96, 96) if name in ("alexnet", "inception_v3") else (64, 64))
    expected = net(x)

    def check(found, wanted):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))

    flat, acs = to_3d(net, "2.5d"), to_3d(net, "acs")
    for made in (flat, acs):
        check(made(x.unsqueeze(2)), expected)
    if name != "inception_v3":  # its average pools count the zeros beyond the first and last slice
        check(flat(x.unsqueeze(2).expand(-1, -1, 5, -1, -1)), expected)
    volumes = torch.randn(2, 3, 5, *x.shape[2:])
    together = acs(volumes)
    if not torch.allclose(expected[0], expected[1]):  # untrained mobilenet_v3 takes all pictures for one
        assert not torch.allclose(together[0], together[1])
    check(together, torch.cat([acs(volumes[:1]), acs(volumes[1:])]))  # no volume sees another
