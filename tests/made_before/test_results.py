"""Records of before are read, found again instead of being made anew, and made again they say the same."""

import json
import shutil

import pytest

RESULTS = ["linear-probe", "linear-probe-masks", "knn", "classification", "segmentation", "detection"]
SAME = [name for name in RESULTS if name != "segmentation"]
"""Results whose protocol is of the version of before."""


def contents(folder):
    """Every record, with the seconds it took, but without what a printed table adds: warning and digest."""
    found = {}
    for path in folder.glob("*.json"):
        found[path.name] = json.loads(path.read_text(encoding="utf-8"))
        found[path.name]["flags"].pop("warnings", None)
        found[path.name].pop("digest", None)
    return found


@pytest.mark.parametrize("name", RESULTS)
def test_a_record_is_read_whole(name, place):
    from ssl3d.api import read_result

    paths = sorted((place / "results" / name).glob("*.json"))
    assert paths
    for path in paths:
        raw, read = json.loads(path.read_text(encoding="utf-8")), read_result(path)
        for field in ("scores", "intervals", "predictions", "contestant", "compute"):
            assert json.loads(json.dumps(getattr(read, field))) == raw[field], f"{path.name}: {field}"
        assert read.key.startswith(path.stem.rpartition("-")[2])


@pytest.mark.parametrize("name", SAME)
def test_what_has_a_record_is_not_done_again(name, place, made, same_machine):
    folder = place / "results" / name
    before = contents(folder)
    made.ssl3d(made.RESULTS[name], "--out", folder)
    after = contents(folder)
    assert all(after[name] == record for name, record in before.items())
    # Untrained weights differ in their last bits where other kernels draw them: they are others' rows.
    assert all(new.startswith("scratch") and not same_machine for new in set(after) - set(before))


@pytest.mark.parametrize("name", SAME)
def test_made_again_a_record_has_its_name_and_numbers(name, place, made, same_machine):
    made.ssl3d(made.RESULTS[name], "--out", "again")

    now, before = made.records(place / "again"), made.records(place / "results" / name)
    if same_machine:
        made.close(now, before)
        return
    # Other kernels make other last bits: of digests, of counts of voxels, of untrained weights.
    now, before = ({nameless(name): one for name, one in found.items()} for found in (now, before))
    made.close(
        {k: losses(one) for k, one in now.items()}, {k: losses(one) for k, one in before.items()}, 1e-3
    )
    for name, one in before.items():
        made.close(now[name]["scores"], one["scores"], rel=2e-2, abs=2e-2, where=name)


def test_segmentations_of_before_stay_beside_those_of_the_new_version(place, made, same_machine, capsys):
    """Scores are another version's; with the fixed recipe of before as flags the training is the same."""
    from ssl3d.api import read_result
    from ssl3d.cli import main

    folder = place / "results" / "segmentation"
    before, old = contents(folder), made.records(folder)
    fixed = (
        "--segmentation.width 32 --segmentation.axes 0 1 2 --segmentation.flip-axes 2 --ema 0 "
        "--segmentation.batch-dice true --segmentation.low-resolution 0"
    )
    made.ssl3d(f"{made.RESULTS['segmentation']} {fixed}", "--out", folder)
    assert all(contents(folder)[name] == record for name, record in before.items())
    new = {name: record for name, record in made.records(folder).items() if name not in old}
    assert len(new) == len(old) and {read_result(folder / name).version for name in new} == {106}
    curves = [{name.rpartition("-")[0]: losses(one) for name, one in some.items()} for some in (new, old)]
    made.close(*curves, rel=1e-4 if same_machine else 1e-3)
    capsys.readouterr()
    main(["leaderboard", "report", str(folder), "--out", str(place / "both")])
    page = (place / "both" / "report.md").read_text(encoding="utf-8")
    assert "task version 102, the table has 106" in page


def nameless(name):
    """The name of a record, without the digest of weights that were drawn here."""
    return name.rpartition("-")[0] if name.startswith("scratch") else name


def losses(record):
    """Of each step of fine-tuning: what was drawn decides it."""
    curve = record["details"].get("curve", []) if isinstance(record["details"], dict) else []
    return [point["loss"] for point in curve]


def test_a_sorting_run_of_before_places_volumes_where_it_did(place, made):
    made.ssl3d("pretrain --resume stopped/sorting")
    shutil.move(place / "stopped", place / "whole")
    made.ssl3d(f"localize whole/sorting {made.LOCALIZE} --out again")
    now, before = (
        json.loads((folder / "localize.json").read_text(encoding="utf-8"))
        for folder in (place / "again", place / "results" / "localize")
    )
    made.close(now, before, rel=1e-3, abs=1e-2)
