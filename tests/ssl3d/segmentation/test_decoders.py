"""Decoders that travel: trained by proxies, exported beside the encoder, put into a segmentation head."""

import json

import numpy as np
import pytest
import torch

import ssl3d
from ssl3d.api import UsageError, load_decoder, start_from
from ssl3d.checkpoint.travellers import load_traveller
from ssl3d.encoders.resnet import ResNet10
from ssl3d.errors import CheckpointError
from ssl3d.heads.decoder import Decoder
from ssl3d.segmentation.decoders import decode, restoring_decoder
from ssl3d.segmentation.heads import UNetHead, segmentation_head

OPTIONS = {"width": 8, "kind": "acs", "stem_kernel": 3, "stem_stride": [1, 1, 1]}
COMMON = {
    "encoder": "resnet10", "resnet10": OPTIONS, "steps": 2, "batch_size": 4, "eval_every": -1, "workers": 0,
    "threads": 1, "precision": "32",
}  # fmt: skip
CROP = {"crop": [16, 16, 16], "width": 8}
PROXIES = {
    "mae": {**CROP, "decoder": "unet"},
    "models_genesis": {**CROP, "decoder": "unet"},
    "context_restoration": {**CROP, "decoder": "unet"},
    "transvw": {**CROP, "decoder": "unet", "words": 8},
    "glcl": {"crop": [32, 32], "width": 8, "local_stride": 2, "negatives": 4, "schedule": "joint"},
}


def encoder(**options):
    torch.manual_seed(0)
    return ResNet10(ResNet10.Config(width=8, stem_kernel=3, stem_stride=(1, 1, 1), **options))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from ssl3d.data.phantoms import phantom_store

    return str(phantom_store(8, shape=(24, 32, 32), folder=tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, store):
    """runs(proxy): a run of two steps, trained once."""
    made = {}

    def run(name, **options):
        key = name, json.dumps(options)
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / name
            made[key] = ssl3d.pretrain(name, store, out, **{name: {**PROXIES[name], **options}}, **COMMON)
        return made[key]

    return run


@pytest.mark.parametrize("name", PROXIES)
def test_what_was_trained_is_what_travels_and_what_the_head_starts_from(name, runs):
    run = runs(name)
    trained = ssl3d.load_proxies(run.folder)[name].decoder.state_dict()
    exported = load_traveller(run.folder, "decoder").state_dict()
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[key], exported[key]) for key in trained)
    head = segmentation_head("unet", ssl3d.load_encoder(run.folder), 3, 8, "instance", True)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    line = start_from(head, load_decoder(str(run.folder)))
    after = head.state_dict()
    taken = [key for key in after if not key.startswith(("out.", "coarse."))]
    assert all(torch.equal(after[key], exported[key]) for key in taken)
    new = sorted(set(after) - set(taken))
    assert all(torch.equal(after[key], before[key]) for key in new) and "coarse.0.weight" in new
    assert f"{len(taken)} tensors of the head from its decoder, new: {', '.join(new)}" in line
    assert "\n" not in line and str(run.folder) in line


@pytest.mark.parametrize("name", [name for name in PROXIES if name != "glcl"])
def test_the_light_decoder_stays_the_default_and_at_home(name, runs):
    from ssl3d import plugins

    assert plugins.load(plugins.PROXIES, name).Config().decoder == "light"
    with pytest.raises(
        CheckpointError, match="no decoder travelled with this encoder; pretrain with glcl, or"
    ):
        load_decoder(str(runs(name, decoder="light").folder))


@pytest.mark.parametrize("name", [name for name in PROXIES if name != "glcl"])
def test_restoring_with_a_unet_keeps_the_contract(name):
    from ssl3d import plugins
    from ssl3d.config import from_dict
    from ssl3d.testing import check_proxy

    cls = plugins.load(plugins.PROXIES, name)
    check_proxy(name, from_dict(cls.Config, PROXIES[name], name), encoder=encoder, steps=30)


def test_both_decoders_give_every_voxel():
    made, x = encoder(in_channels=2), torch.randn(2, 2, 9, 16, 12)
    light, unet = (restoring_decoder(kind, made, 8) for kind in ("light", "unet"))
    assert isinstance(light, Decoder) and isinstance(unet, UNetHead)
    maps = made(x)
    assert torch.equal(decode(light, x, maps), light(maps, x.shape[2:]))
    assert decode(unet, x, maps).shape == x.shape
    assert unet.sources == light.sources
    with pytest.raises(UsageError, match="decoder unet has skips"):
        restoring_decoder("unet", made, 8, skips=False)


def test_a_unet_is_made_again_of_its_options():
    head = UNetHead(encoder(), 3, 8, "group", True)
    again = UNetHead.from_config(head.config)
    again.load_state_dict(head.state_dict())
    x = torch.randn(1, 1, 8, 16, 16)
    maps = encoder().eval()(x)
    assert torch.equal(again.eval()(x, maps)[0], head.eval()(x, maps)[0])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"width": 16}, r"width 8 there, 16 here; \d+ of \d+ tensors do not match"),
        ({"norm": "group"}, "norm 'instance' there, 'group' here"),
    ],
)
def test_another_head_is_refused_and_stays_as_it_was(options, words, runs):
    decoder = load_decoder(str(runs("mae").folder))
    head = UNetHead(encoder(), 3, **{"width": 8, **options})
    before = {key: value.clone() for key, value in head.state_dict().items()}
    with pytest.raises(UsageError, match=words) as error:
        start_from(head, decoder)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    with pytest.raises(UsageError, match="the head a LinearHead: choose head unet"):
        start_from(segmentation_head("linear", encoder(), 3), decoder)


def test_a_missing_tensor_is_refused_by_name(runs):
    decoder = load_decoder(str(runs("mae").folder))
    name = next(key for key in decoder.state if key.startswith("mixes"))
    rest = {key: value for key, value in decoder.state.items() if key != name}
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        start_from(UNetHead(encoder(), 3, 8), decoder._replace(state=rest))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Six subjects with a bright box to find."""
    from ssl3d.api import Record, assemble, write_part

    folder = tmp_path_factory.mktemp("masked")
    rng = np.random.default_rng(0)
    for number in range(10):
        mask = np.zeros((16, 24, 24), np.int64)
        mask[4:12, 6:16, 6:16] = 1
        image = rng.normal(size=mask.shape) + 3 * mask
        record = Record(f"v{number}", "boxes", f"s{number}", spacing=(1.0, 1.0, 1.0))
        write_part(folder / "parts", record.id, record, np.float32(image)[None], mask=mask)
    assemble(folder / "parts", folder / "masked.h5", {}, [])
    return str(folder / "masked.h5")


def finetuned(run, data, out, init):
    from ssl3d.cli import main

    words = ["finetune", f"glcl={run.folder}", "--data", data, "--task", "segmentation", "--out", str(out)]
    words += ["--steps", "2", "--batch-size", "2", "--eval-at", "0", "--keep", "last", "--lr", "1e-4"]
    words += ["--segmentation.width", "8", "--segmentation.patch", "16", "16", "16", "--no-trivial", "true"]
    words += ["--segmentation.init", init, "--keep-models", "none", "--precision", "32", "--ema", "0"]
    return main([*words, "--segmentation.slicewise", "false"])


def test_an_arm_with_its_decoder_is_another_contestant_of_one_table(runs, masked, tmp_path, capsys):
    assert finetuned(runs("mae"), masked, tmp_path / "out", "new") in (0, None)
    assert finetuned(runs("mae"), masked, tmp_path / "out", "pretrained") in (0, None)
    assert "tensors of the head from its decoder, new: coarse" in "".join(capsys.readouterr())
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    by_name = {record["contestant"]["name"]: record for record in records}
    scratch = next(name for name in by_name if name.startswith("scratch"))
    assert set(by_name) == {"glcl", "glcl, with decoder", scratch}  # trained once for both commands
    plain, decoded = by_name["glcl"], by_name["glcl, with decoder"]
    assert plain["settings"] == decoded["settings"] and "init" not in plain["settings"]["task"]
    assert plain["contestant"]["digest"] != decoded["contestant"]["digest"]
    assert decoded["contestant"]["decoder"] and "decoder" not in plain["contestant"]
    first = [record["compute"]["details"]["curve"][0] for record in (plain, decoded)]
    assert [entry["step"] for entry in first] == [0, 0]
    assert first[0]["score"] != first[1]["score"]  # before the first step, the outputs differ already


def test_a_run_without_a_decoder_is_refused_by_name(runs, masked, tmp_path, capsys):
    run = runs("mae", decoder="light")
    assert finetuned(run, masked, tmp_path / "out", "pretrained") not in (0, None)
    said = "".join(capsys.readouterr())
    assert str(run.folder) in said and "no decoder travelled with this encoder" in said
    assert not (tmp_path / "out").exists()
