"""Runs that were stopped under the code of before go on under today's, and end as they would have ended."""

import shutil

import pytest

RUNS = ["sorting", "several", "deepcluster_v2", "intra_inter"]


def same_end(found, expected, made, same_machine):
    """The bytes of before on its machine; elsewhere the numbers, as other kernels round otherwise."""
    assert found["steps"] == expected["steps"] == made.STEPS
    made.close(found["numbers"], expected["numbers"], rel=5e-3, abs=1e-3)
    if same_machine:
        assert found["encoder.safetensors"] == expected["encoder.safetensors"]
        assert found["last"] == expected["last"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_to_the_bytes_of_the_uninterrupted_one(name, place, made, kept, same_machine):
    folder = place / "stopped" / name
    assert not (folder / "encoder").exists()
    made.ssl3d(f"pretrain --resume stopped/{name}")
    same_end(made.ended(folder), kept["runs"][name], made, same_machine)


def test_a_run_goes_on_from_another_folder_with_its_data_elsewhere(
    place, made, kept, same_machine, tmp_path
):
    run = shutil.move(place / "stopped" / "sorting", tmp_path / "moved here")
    data = shutil.move(place / "store.h5", tmp_path / "people of before.h5")
    made.ssl3d("pretrain --resume", run, "--data", data)
    same_end(made.ended(run), kept["runs"]["sorting"], made, same_machine)


def test_the_heads_of_a_stopped_run_are_loaded(place):
    import ssl3d

    for name in RUNS:
        proxies = ssl3d.load_proxies(place / "stopped" / name)
        assert list(proxies) == (["sorting", "simclr"] if name == "several" else [name])
