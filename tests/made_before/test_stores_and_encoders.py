"""Stores and encoders of before are read by today's code, and hold what they held."""

import json

import pytest


@pytest.mark.parametrize("name", ["store.h5", "pictures.h5"])
def test_a_store_holds_what_it_held(name, place, made, kept):
    made.close(made.stored(name), kept["stores"][name], rel=1e-6)


def test_the_command_tells_what_is_in_a_store(place, made, kept, capsys):
    made.ssl3d("info store.h5 --json true")
    told = json.loads(capsys.readouterr().out)
    assert told["volumes"] == len(kept["stores"]["store.h5"]) - 1


@pytest.mark.parametrize("name", ["resnet", "converted", "intra_inter"])
def test_an_encoder_embeds_as_it_did(name, place, made, kept):
    if name == "converted":
        pytest.importorskip("timm", reason="the converted network is timm's smallest")
    made.close(made.embedding(place / "encoders" / name), kept["encoders"][name])


def test_an_aggregator_pools_as_it_did(place, made, kept):
    made.ssl3d("embed encoders/intra_inter --data store.h5 --pool aggregator --out features.h5")
    made.close(made.features("features.h5"), kept["aggregated"]["intra_inter"])
