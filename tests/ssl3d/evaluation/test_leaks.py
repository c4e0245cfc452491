"""The leak check: scans are found again under another name, and other scans are not taken for them."""

import json
import shutil

import numpy as np
import pytest

from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.checkpoint.volumes_seen import HASHES, hashes_complete, hashes_in, pack_hashes
from ssl3d.data.identity import identity_hash, reading_of, source_hash
from ssl3d.data.open import open_data
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.errors import CheckpointError
from ssl3d.evaluation.leaks import leak_flags, seen_volumes, volume_hashes
from ssl3d.specs import encoder_from


def scan(seed, shape=(1, 20, 24, 28)):
    """A smooth blob with noise: what anatomy is to block means."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[1:]), indexing="ij"))
    blob = np.exp(-((grid - 0.2 * rng.normal(size=(3, 1, 1, 1))) ** 2).sum(axis=0) * 3)
    return (blob + 0.1 * rng.normal(size=shape)).astype(np.float32)


def store(path, entries, dataset="set", dtype="float16", mask=None):
    parts = path.with_name(path.name + ".partial")
    for name, image in entries.items():
        record = Record(name, dataset, f"subject-{name}", sha256=f"sha of {dataset} {name}")
        write_part(parts, name, record, image, mask=mask, dtype=dtype)
    assemble(parts, path, {}, [])
    shutil.rmtree(parts)
    return open_data([path])


def shared(a, b):
    """Whether two hex strings of hashes have one in common."""
    pieces = [{text[at : at + 16] for at in range(0, len(text), 16)} for text in (a, b)]
    return bool(pieces[0] & pieces[1])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(np.float16),
        lambda x: 3.7 * x - 12,
        lambda x: np.rint((x - x.min()) / np.ptp(x) * 65534 - 32767).astype(np.int16),
        lambda x: (x + 1e-5 * np.random.default_rng(0).normal(size=x.shape)).astype(np.float32),
    ],
    ids=["half precision", "linear", "int16", "rounding noise"],
)
def test_the_same_voxels_in_another_form_are_found(seed, change):
    image = scan(seed)
    assert shared(reading_of(image), reading_of(change(image)))


def test_other_people_are_not_taken_for_one():
    hashes = [reading_of(scan(seed)) for seed in range(300)]
    pieces = [text[at : at + 16] for text in hashes for at in (0, 16)]
    assert len(set(pieces)) == 600


def test_flat_images_and_masks_have_readings_and_empty_ones_have_none():
    assert len(reading_of(scan(1, (1, 1, 28, 28)))) == 32
    mask = scan(2) > 0.5
    assert reading_of(mask) == reading_of(mask.astype(np.float16) * 5 - 1) != ""
    other = mask.copy()
    other[0, 10, 12, 14] ^= True
    assert reading_of(other) != reading_of(mask)
    tiny = np.zeros((1, 9, 9, 9), np.float32)
    tiny[0, 4, 4, 4:6] = 1
    assert reading_of(np.zeros((1, 4, 4, 4))) == reading_of(tiny) == ""


def test_a_source_is_its_bytes_and_the_place_in_it():
    assert source_hash("ab", "a/x.npz#images[3]") == source_hash("ab", "b/y.npz#images[3]")
    assert source_hash("ab", "x.npz#images[3]") != source_hash("ab", "x.npz#images[4]")
    assert source_hash("", "x.nii") == "" and len(source_hash("ab", "x.nii")) == 16


def test_a_scan_prepared_under_another_name_is_found(tmp_path):
    mask = np.ones((20, 24, 28), np.uint8)
    trained = store(tmp_path / "a.h5", {"p1": scan(1), "p2": scan(2)})
    renamed = store(
        tmp_path / "b.h5", {"x": scan(2), "y": scan(3)}, dataset="other", dtype="float32", mask=mask
    )
    hashes = frozenset().union(*volume_hashes(trained))
    assert len(hashes) == 2 * 3  # a file and two readings each
    assert seen_volumes(renamed, hashes).tolist() == [True, False]
    identities = {identity_hash(*person) for person in trained.identities()}
    assert leak_flags(renamed, identities, hashes, False) == {
        "seen_test_subjects": 1,
        "seen_test_volumes": 1,
        "saw_labels": False,
        "ranked": False,
    }
    # By name alone nothing is seen, and an old checkpoint does not know of voxels.
    assert leak_flags(renamed, identities, None, True) == {
        "seen_test_subjects": 0,
        "seen_test_volumes": None,
        "saw_labels": True,
        "ranked": True,
    }


def test_hashes_of_some_volumes_do_not_say_that_none_was_seen(tmp_path):
    trained = store(tmp_path / "a.h5", {"p1": scan(1)})
    tested = store(tmp_path / "b.h5", {"x": scan(2)}, dataset="other")
    card = {"steps": 3, "volumes_seen": pack_hashes(volume_hashes(trained)[0]) | {"incomplete": True}}
    assert not hashes_complete(card) and hashes_in(card) == volume_hashes(trained)[0]
    whole = {"steps": 3, "volumes_seen": pack_hashes(volume_hashes(trained)[0])}
    assert hashes_complete(whole) and not hashes_complete({"steps": 3})

    def seen(data, found):
        return leak_flags(data, [], hashes_in(found), False, hashes_complete(found))["seen_test_volumes"]

    assert seen(tested, card) is None and seen(tested, whole) == 0
    assert seen(trained, card) == 1  # what is found is found


def test_the_same_file_prepared_otherwise_is_found(tmp_path):
    trained = store(tmp_path / "a.h5", {"p1": scan(1)})
    hashes = frozenset().union(*volume_hashes(trained))
    cropped = store(tmp_path / "b.h5", {"p1": scan(1)[:, 3:, 5:]})  # the same sha256
    assert seen_volumes(cropped, hashes).tolist() == [True]


def test_a_store_without_readings_is_read(tmp_path, monkeypatch):
    import ssl3d.data.store.writer as writer

    fresh = store(tmp_path / "a.h5", {"p1": scan(1)})
    monkeypatch.setattr(writer, "reading_of", lambda image: "")
    old = store(tmp_path / "old.h5", {"p1": scan(1)})
    assert old[0].record.reading == ""
    assert volume_hashes(old) == volume_hashes(fresh)
    older = store(tmp_path / "older.h5", {"p1": scan(1)})
    assert volume_hashes(older, lazy_voxels=0) == [frozenset({source_hash("sha of set p1", "")})]


@pytest.mark.parametrize("count", [3, 30_000])
def test_hashes_travel_in_the_checkpoint(tmp_path, count):
    hashes = frozenset(f"{k:016x}" for k in range(count))
    folder = save_encoder(
        encoder_from("scratch:resnet10:width=4"),
        tmp_path / "encoder",
        {"steps": 1, "identities": ["ab" * 8], "volumes_seen": pack_hashes(hashes)},
    )
    assert (folder / HASHES).exists() == (count > 3)
    assert len((folder / "encoder.json").read_bytes()) < 20_000
    assert hashes_in(load_encoder(folder).metadata) == hashes
    if count > 3:
        (folder / HASHES).write_bytes(b"others")
        with pytest.raises(CheckpointError, match=r"volumes_seen\.bin: its bytes are not"):
            load_encoder(folder)


def test_what_a_checkpoint_knows():
    assert hashes_in(encoder_from("scratch:resnet10:width=4").metadata) == frozenset()
    assert hashes_in({"steps": 10, "identities": ["a"]}) is None
    assert hashes_in({"steps": 10, "volumes_seen": {"base64": "!"}}) is None
    assert hashes_in(json.loads(json.dumps({"volumes_seen": pack_hashes([])}))) == frozenset()


def test_pretraining_keeps_hashes_time_and_memory(tmp_path):
    from ssl3d.cli import main

    words = "--proxy simclr --data phantoms:4 --encoder resnet10 --resnet10.width 4 --simclr.crop 16 16 16"
    run = tmp_path / "run"
    assert (
        main(
            [
                "pretrain",
                *words.split(),
                "--batch-size",
                "2",
                "--steps",
                "1",
                "--warmup",
                "0",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    card = load_encoder(run).metadata
    data = open_data(["phantoms:4"])
    kept = hashes_in(card)
    assert kept and sum(seen_volumes(data, kept)) == card["data"]["volumes"]
    assert card["compute"]["seconds"] > 0 and card["compute"]["peak_memory"] > 1 << 20
