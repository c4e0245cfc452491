"""Placing volumes and crops on a common axis: by known curves, by a stand-in proxy, by the command."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d import cli
from ssl3d.errors import DataError
from ssl3d_benchmarks.localize.axis import Axis, Profile, common_axis
from ssl3d_benchmarks.localize.run import picture, place_volume, summarize


def curve(mm):
    """A monotone anatomy: steep in the middle, slow towards the ends."""
    return np.tanh(np.asarray(mm) / 60) * 3 + np.asarray(mm) / 100


def cut(start, stop, step=2.0, noise=0.0, seed=0, sign=1):
    """The profile of a scan from `start` to `stop` mm of the anatomy, in its own coordinates."""
    mm = np.arange(0, stop - start, step)
    rng = np.random.default_rng(seed)
    return Profile(mm, sign * curve(start + mm) + noise * rng.normal(size=len(mm)))


AXIS = Axis(np.arange(-150, 151, 2.0), curve(np.arange(-150, 151, 2.0)))


@settings(max_examples=40, deadline=None)
@given(st.floats(-140, 60), st.floats(20, 80), st.floats(0.7, 5))
def test_a_crop_is_placed_where_it_was_cut(start, length, step):
    where = AXIS.place(cut(start, start + length, step))
    assert where.offset == pytest.approx(start, abs=1.0)
    assert not where.flipped


def test_a_scan_on_its_head_is_noticed_only_where_that_may_be():
    profile = cut(-60, 20)
    head = Profile(profile.mm, profile.scores[::-1].copy())
    found = AXIS.place(head, flips=True)
    assert found.flipped
    assert np.allclose(found(head.mm), (-60 + profile.mm)[::-1], atol=1.5)
    assert not AXIS.place(head).flipped
    assert AXIS.place(head).misfit > 10 * found.misfit
    assert not AXIS.place(profile, flips=True).flipped


def test_noise_moves_a_crop_little():
    starts = np.linspace(-80, 20, 20)
    errors = [abs(AXIS.place(cut(s, s + 50, noise=0.3, seed=n)).offset - s) for n, s in enumerate(starts)]
    assert np.median(errors) < 6


def test_volumes_cut_differently_share_one_axis():
    starts = np.array([-120.0, -90, -100, -60, -110, -75])
    profiles = [cut(s, s + 180, noise=0.1, seed=n) for n, s in enumerate(starts)]
    axis, placed = common_axis(profiles)
    found = np.array([where.offset for where in placed])
    assert np.allclose(found - found.mean(), starts - starts.mean(), atol=6)
    middles = [where(np.array(p.middle)) for where, p in zip(placed, profiles)]
    assert np.mean(middles) == pytest.approx(0, abs=2)  # the zero of the axis
    assert (np.diff(axis.scores) >= 0).all()


def test_scores_that_fall_along_the_axis_serve_as_well():
    profiles = [cut(s, s + 150, sign=-1) for s in (-80.0, -70, -90)]
    axis, placed = common_axis(profiles)
    assert axis.scores[0] > axis.scores[-1]
    assert placed[1].offset - placed[0].offset == pytest.approx(10, abs=3)


def test_directions_unknown_are_settled_by_the_longest():
    profiles = [cut(-100, 100), cut(-90, 80), cut(-80, 90)]
    profiles[1] = Profile(profiles[1].mm, profiles[1].scores[::-1].copy())
    _, placed = common_axis(profiles, [True] * 3)
    assert [where.flipped for where in placed] == [False, True, False]


def test_constant_scores_are_refused():
    flat = Profile(np.arange(20.0), np.zeros(20))
    with pytest.raises(DataError, match="has not learnt to sort"):
        common_axis([flat, flat])


# A stand-in proxy ------------------------------------------------------------------------------------


class Oracle:
    """Scores slices of a scan that begins at a known place of the anatomy."""

    config = SimpleNamespace(axis="D", slab=1, direction="fixed")

    def __init__(self, slab=1):
        self.config = SimpleNamespace(axis="D", slab=slab, direction="fixed")
        self.asked = []

    def profile(self, volume, start=None, stop=None):
        first, end = 2 if start is None else start, volume.count - 3 if stop is None else stop
        self.asked.append((start, stop))
        positions = np.arange(first, end - self.config.slab + 1) + (self.config.slab - 1) / 2
        return positions, curve(volume.start + positions * volume.spacing[0])


def scan(start=-90.0, count=60, spacing=3.0):
    return SimpleNamespace(
        start=start,
        count=count,
        spacing=(spacing, 1.0, 1.0),
        id="v",
        dataset="d",
        subject="s",
        orientation="SAR",
    )


@pytest.mark.parametrize("slab", [1, 3])
def test_an_oracle_makes_no_error_and_guessing_does(slab):
    oracle, volume = Oracle(slab), scan()
    rows, profile, whole = place_volume(oracle, volume, AXIS, 30, (0.3, 0.6), seed=0)
    assert [row.kind for row in rows] == ["volume"] + ["crop"] * 30
    assert (rows[0].first_slice, rows[0].last_slice) == (2, 56)  # the foreground
    assert rows[0].tau == pytest.approx(1)
    assert whole.offset == pytest.approx(volume.start, abs=1.5)
    middle = np.mean(profile.mm)
    for row, (start, stop) in zip(rows[1:], oracle.asked[1:]):
        assert (row.first_slice, row.last_slice) == (start, stop - 1)
        assert 2 <= start < stop <= 57
        assert 0.3 * 55 - 1 <= stop - start <= 0.6 * 55 + 1
        assert row.error < 2
        assert row.error_slices == pytest.approx(row.error / 3)
        true_middle = (start + stop - 1) / 2 * 3
        assert row.centre_error == pytest.approx(abs(true_middle - middle))
        # The volume's own middle lies at -90 + 87 = -3 mm of the axis, not at 0.
        assert row.frame_error == pytest.approx(3, abs=2)
    found = summarize(rows)
    assert found["error"]["median"] < 2 < 10 < found["centre_error"]["median"]
    assert found["error"]["p90"] >= found["error"]["median"]
    assert (found["volumes"], found["crops"]) == (1, 30)


def test_crops_are_a_function_of_the_seed():
    def cuts(seed):
        rows, _, _ = place_volume(Oracle(), scan(), AXIS, 5, (0.3, 0.6), seed)
        return [(row.first_slice, row.last_slice) for row in rows]

    assert cuts(1) == cuts(1) != cuts(2)


def test_a_volume_of_few_slices_is_refused():
    with pytest.raises(DataError, match="has 3 slices along D, but 4 are needed to place it"):
        place_volume(Oracle(), scan(count=8), AXIS, 1, (0.3, 0.6), 0)


# The command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short sorting run on phantoms."""
    folder = tmp_path_factory.mktemp("localize")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL3D_CACHE", str(folder / "cache"))
        words = "--proxy sorting --data phantoms:24 --steps 60 --batch-size 8 --lr 3e-3 --encoder resnet10"
        small = "--resnet10.width 8 --sorting.crop 32 32 --workers 0 --precision 32 --eval-every -1"
        assert cli.main(["pretrain", *words.split(), *small.split(), "--out", str(folder / "run")]) == 0
        yield folder / "run"


def test_the_command_places_unseen_phantoms(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["localize", str(run), "--data", "phantoms:24", "--crops", "3", "--out", str(out)]) == 0
    record = json.loads((out / "localize.json").read_text(encoding="utf-8"))
    assert record["reference"]["from"] == "seen in pretraining"
    scores = record["scores"]
    assert scores["crops"] == 3 * scores["volumes"] > 0
    assert scores["error"]["median"] < 0.6 * scores["centre_error"]["median"]
    with (out / "localize.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == scores["crops"] + scores["volumes"]
    assert {row["kind"] for row in rows} == {"volume", "crop"}
    assert (out / "localize.png").stat().st_size > 5000
    assert "if the middle of the volume is guessed" in capsys.readouterr().out


def test_people_seen_in_pretraining_are_not_placed(run, tmp_path):
    from ssl3d.api import identity_hash

    known = set(json.loads((run / "encoder" / "encoder.json").read_text(encoding="utf-8"))["identities"])
    cli.main(["localize", str(run), "--data", "phantoms:24", "--crops", "0", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "localize.json").read_text(encoding="utf-8"))["rows"]
    assert rows
    assert not known & {identity_hash(row["dataset"], row["subject"]) for row in rows}


def test_a_reference_that_is_all_there_is(run, tmp_path, capsys):
    words = ["--data", "phantoms:24", "--reference", "phantoms:24", "--out", str(tmp_path)]
    assert cli.main(["localize", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert "all 24 volumes are" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere"),
        (["{run}", "--share", "0.9", "0.1"], "share"),
        (["{run}", "--proxy", "simclr"], "these do: sorting"),
        (["{run}", "--data", "nothing-here.h5"], "nothing-here.h5"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(run, words, message, capsys, tmp_path):
    words = [word.format(run=run) for word in words]
    assert cli.main(["localize", *words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line_and_holds_nothing_half_written(run, capsys, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    words = ["--data", "phantoms:24", "--crops", "0", "--out", str(tmp_path / "file" / "out")]
    assert cli.main(["localize", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert "cannot be written (Not a directory)" in error
    assert error.count("\n") == 1


def test_a_full_disk_leaves_the_results_of_before(run, monkeypatch, tmp_path):
    words = ["localize", str(run), "--data", "phantoms:24", "--crops", "0", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert cli.main(words) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_picture_says_what_crops_are_compared_with_and_cuts_no_words_off():
    """The words ended at the picture's edge before "whole scan", which is the truth that they tell of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = picture(AXIS, [], [])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    right = figure.axes[1]
    words = " ".join(right.get_xlabel().split())
    assert "the same encoder places the whole scan" in words and "no anatomical truth" in words
    for label in (right.xaxis.label, right.yaxis.label, right.title):
        box = label.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
