"""`ssl3d export --to hf` and `--to nnunet`, read by huggingface_hub and by nnU-Net's network."""

import json
import shutil

import pytest
import torch

import ssl3d
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.export import hub, run
from ssl3d.specs import encoder_from

huggingface_hub = pytest.importorskip("huggingface_hub")


def export(what, form, out, *words):
    return main(["export", str(what), "--to", form, "--out", str(out), *words])


@pytest.fixture
def offline(monkeypatch):
    """Let no connection be made."""

    def refuse(*_, **__):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_huggingface_hub_loads_a_models_folder_and_its_card_says_what_it_is(segmenter, tmp_path, offline):
    out = tmp_path / "out"
    assert export(segmenter, "hf", out, "--licence", "cc-by-4.0") == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md", "export.json", "model.json", "model.safetensors"
    }  # fmt: skip
    ours = ssl3d.load_model(segmenter)
    empty = ssl3d.load_model(segmenter).network
    for value in empty.state_dict().values():
        value.zero_()
    found = huggingface_hub.load_torch_model(empty, out, strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    x = torch.randn(1, 1, 12, 12, 12)
    with torch.no_grad():
        assert torch.equal(empty(x)[0], ours(x)[0])
        assert torch.equal(ssl3d.load_model(out)(x)[0], ours(x)[0])
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "ssl3d"
    assert card.data.pipeline_tag == "image-segmentation" and "resnet10" in card.data.tags
    for part in ("Use", "Data", "Licence", "Intended use", "Scores", "Limits", "Citations"):
        assert f"\n## {part}\n" in card.text
    dice = ours.card["scores"]["dice"]
    assert f"| dice | {dice:.4g} | " in card.text and "bright, dark" in card.text and "blocks" in card.text
    assert str(tmp_path.parent) not in card.text
    assert "Its pretraining saw 3 of them" in hub._scores({**ours.card, "seen_test_subjects": 3})
    assert "Its pretraining saw" not in card.text


def test_an_encoders_folder_is_read_too_and_an_unknown_licence_is_said(encoder, tmp_path, offline):
    out = tmp_path / "out"
    assert export(encoder, "hf", out) == 0
    ours, again = ssl3d.load_encoder(encoder), ssl3d.load_encoder(out)
    empty = encoder_from("scratch:resnet10:acs:width=4", seed=9)
    pattern = "encoder{suffix}.safetensors"
    huggingface_hub.load_torch_model(empty, out, strict=True, filename_pattern=pattern)
    x = torch.randn(1, 1, 16, 24, 20)
    with torch.no_grad():
        assert torch.equal(again.embed(x), ours.embed(x)) and torch.equal(empty.embed(x), ours.embed(x))
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.license == "unknown" and "Nobody has stated one" in card.text
    assert "Yang et al." in card.text


def test_names_of_classes_are_no_markdown(segmenter):
    assert hub._plain("<b>*a*|\n# b") == r"\<b\>\*a\*\| \# b"


class Hub:
    """Hub that keeps what is uploaded to it, or fails with the token in its words."""

    asked: list = []
    fails = False

    def __init__(self, token):
        self.token = token

    def create_repo(self, name, **words):
        if self.fails:
            raise OSError(f"401: bad token {self.token}")
        self.asked.append((name, words))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path, **_):
        self.asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_nothing_is_uploaded_unless_asked_and_the_token_is_shown_nowhere(
    encoder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert export(encoder, "hf", tmp_path / "one") == 0
    assert not Hub.asked
    assert export(encoder, "hf", tmp_path / "two", "--push", "me/mine") == 0
    assert Hub.asked[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert "encoder.safetensors" in Hub.asked[1][1]
    monkeypatch.setattr(Hub, "fails", True)
    assert export(encoder, "hf", tmp_path / "three", "--push", "me/mine") == 3
    monkeypatch.delenv("HF_TOKEN")
    assert export(encoder, "hf", tmp_path / "four", "--push", "me/mine") == 2
    shown = capsys.readouterr()
    assert "401: bad token ***" in shown.err and "set HF_TOKEN" in shown.err
    assert "hf_secret" not in shown.out + shown.err
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in content for content in kept)


def test_a_full_disk_leaves_what_was_there(encoder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert export(encoder, "hf", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert export(encoder, "hf", out, "--overwrite") == 3
    assert "no space left on the disk" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nnunet_gets_a_whole_network_and_other_encoders_are_refused(encoder, tmp_path, capsys):
    made = encoder_from("scratch:resenc:width=4:stages=3")
    card = {"spacing": [2.0, 1.0, 1.0], "patch": [16, 16, 16], "labels_seen": False}
    folder = save_encoder(made, tmp_path / "resenc", card)
    assert export(folder, "nnunet", tmp_path / "out", "--patch", "32", "32", "32") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "checkpoint_final.pth", "adaptation_plan.json", "architecture.json", "export.json"
    }  # fmt: skip
    about = json.loads((tmp_path / "out" / run.ABOUT).read_text())
    assert about["largest_difference"] == 0 and about["decoder"] == "untrained"
    assert export(encoder, "nnunet", tmp_path / "none") == 2
    assert "nnU-Net's encoders are resenc and plain_unet, this one is a ResNet10" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
