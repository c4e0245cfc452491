"""Our residual encoders as nnU-Net's fine-tuning reads them."""

import dataclasses
import json
import pydoc

import pytest
import torch

from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.convert.foreign import load_foreign
from ssl3d.convert.nnunet import adaptation_plan, export_nnunet
from ssl3d.encoders.plain_unet import PlainUNet, PlainUNetConfig
from ssl3d.encoders.resenc import ResEnc, ResEncConfig
from ssl3d.encoders.resnet import ResNet10, ResNetConfig
from ssl3d.errors import UsageError
from ssl3d.specs import encoder_from

CONFIG = ResEncConfig(
    stages=3, width=4, blocks=(1, 2, 1), max_width=12, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), in_channels=2,
)  # fmt: skip

PLAIN = PlainUNetConfig(
    stages=3, width=4, convolutions=(1, 2, 3), max_width=12, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), in_channels=2,
)  # fmt: skip


@pytest.fixture(params=["residual", "plain"])
def encoder(request):
    torch.manual_seed(0)
    made = (ResEnc(CONFIG) if request.param == "residual" else PlainUNet(PLAIN)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.metadata = {"spacing": [3.0, 1.0, 1.0], "patch": [16, 32, 32], "citations": {"mae": "He et al."}}
    return made


def network(plan):
    """The network that nnU-Net builds from a plan's words, as its `get_network_from_plans` does."""
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    told = plan["architecture_plans"]
    kwargs = dict(told["arch_kwargs"])
    for name in told["arch_kwargs_requiring_import"]:
        kwargs[name] = pydoc.locate(kwargs[name])
    made = getattr(unets, told["arch_class_name"])
    return made(input_channels=plan["pretrain_num_input_channels"], num_classes=2, **kwargs)


def test_nnunet_builds_the_network_loads_the_weights_strictly_and_gives_the_same_maps(tmp_path, encoder):
    file = export_nnunet(encoder, tmp_path / "out", (32, 64, 64))
    assert file == tmp_path / "out" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=True)
    plan = json.loads((tmp_path / "out" / "adaptation_plan.json").read_text(encoding="utf-8"))
    assert plan == content["nnssl_adaptation_plan"]
    theirs = network(plan).eval()
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {
            name.removeprefix(f"{key}."): value
            for name, value in content["network_weights"].items()
            if name.startswith(f"{key}.")
        }
        theirs.get_submodule(key).load_state_dict(part)
    x = torch.randn(1, 2, 8, 16, 16)
    with torch.no_grad():
        for one, other in zip(theirs.encoder(x), encoder(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name in plan["keys_to_in_proj"]:
        assert content["network_weights"][f"{name}.weight"].shape[1] == 2
    first = next(iter(plan["pretrain_plan"]["configurations"].values()))
    assert first["spacing"] == [3.0, 1.0, 1.0] and first["patch_size"] == [16, 32, 32]
    assert plan["recommended_downstream_patchsize"] == [32, 64, 64] and plan["key_to_lpe"] is None
    assert content["citations"] == ["He et al."]


def test_it_comes_back_as_it_was(tmp_path, encoder):
    found = load_foreign(
        export_nnunet(encoder, tmp_path / "mine.pth", (32, 64, 64)), {"in_channels": 2}
    ).encoder
    assert found.config == encoder.config
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, found.state_dict()[key])


def test_the_command_writes_both_files_and_spares_what_is_there(tmp_path, encoder, capsys):
    save_encoder(encoder, tmp_path / "encoder")
    words = ["convert", str(tmp_path / "encoder"), "--to", "nnunet", "--out", str(tmp_path / "n")]
    assert main([*words, "--patch", "16", "32", "32"]) == 0
    assert "numbers as encoder.* of nnU-Net's network" in capsys.readouterr().out
    assert (tmp_path / "n" / "adaptation_plan.json").is_file()
    assert encoder_from(f"{tmp_path / 'n' / 'checkpoint_final.pth'}:in_channels=2").config == encoder.config
    assert main(words) == 2
    assert "exists (--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "made,message",
    [
        (
            lambda: ResNet10(ResNetConfig(width=4)),
            "encoders are resenc and plain_unet, this one is a ResNet10",
        ),
        (lambda: ResEnc(ResEncConfig(width=4, stages=2, norm="group")), "norm group"),
        (lambda: ResEnc(ResEncConfig(width=4, stages=2, kind="acs")), "kind acs"),
    ],
)
def test_what_nnunet_does_not_have_is_refused(tmp_path, made, message):
    with pytest.raises(UsageError, match=message):
        export_nnunet(made(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_patch_that_cannot_be_halved_so_often_is_refused(encoder):
    with pytest.raises(UsageError, match="multiples of the total stride, 2 x 4 x 4"):
        adaptation_plan(encoder, (16, 30, 32))


def test_an_untrained_encoder_is_not_exported(tmp_path, capsys):
    assert main(["convert", "scratch:resenc", "--to", "nnunet", "--out", str(tmp_path / "n")]) == 2
    assert "no trained encoder" in capsys.readouterr().err


def released_loader(network, file):
    """nnU-Net's `load_pretrained_weights`, or its rule where nnunetv2 is not installed."""
    try:
        from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    except ImportError:
        given = torch.load(file, weights_only=True)["network_weights"]
        own = network.state_dict()
        wanted = [key for key in own if ".seg_layers." not in key]
        assert not [key for key in wanted if key not in given or given[key].shape != own[key].shape]
        network.load_state_dict({**own, **{key: given[key] for key in wanted}})
    else:
        load_pretrained_weights(network, str(file))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("made", [ResEnc, PlainUNet])
def test_the_released_loader_of_nnunet_takes_every_weight_that_it_wants(tmp_path, made, bias):
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    config = CONFIG if made is ResEnc else PLAIN
    ours = made(dataclasses.replace(config, conv_bias=bias)).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    file = export_nnunet(ours, tmp_path, (32, 64, 64))
    told = json.loads((tmp_path / "architecture.json").read_text(encoding="utf-8"))
    whole = unets.ResidualEncoderUNet if made is ResEnc else unets.PlainConvUNet
    assert pydoc.locate(told["network_class_name"]) is whole
    kwargs = {name: pydoc.locate(value) if name in told["_kw_requires_import"] and value else value
              for name, value in told["arch_kwargs"].items()}  # fmt: skip
    theirs = whole(2, num_classes=3, deep_supervision=True, **kwargs).eval()
    given = torch.load(file, weights_only=True)["network_weights"]
    assert set(given) == {key for key in theirs.state_dict() if ".seg_layers." not in key}
    released_loader(theirs, file)
    x = torch.randn(1, 2, 8, 16, 16)
    with torch.no_grad():
        for one, other in zip(theirs.encoder(x), ours(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for one, other in zip(theirs.decoder.encoder(x), ours(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert theirs(x)[0].shape == (1, 3, 8, 16, 16)
    for part in (
        theirs.decoder.stages,
        theirs.decoder.transpconvs,
    ):  # new weights, of the scale of nnU-Net's
        for module in part.modules():
            if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
                new = module.weight.detach().clone()
                torch.nn.init.kaiming_normal_(new, a=1e-2)
                assert float(module.weight.detach().std()) == pytest.approx(float(new.std()), rel=0.3)
