"""A leaderboard's report: known ranks, refused rows, leaks, and a page that loads nothing."""

import csv
import dataclasses
import errno
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from ssl3d.api import DataError, Result, UsageError, statistics, write_result
from ssl3d.cli import main
from ssl3d.errors import TransientError
from ssl3d_benchmarks.leaderboard.report.answer import answer
from ssl3d_benchmarks.leaderboard.report.columns import p_text
from ssl3d_benchmarks.leaderboard.report.output import read_report
from ssl3d_benchmarks.leaderboard.report.overall import critical_difference
from ssl3d_benchmarks.leaderboard.report.worth import equal_labels, worths

PEOPLE = 30
CLASSES = ("0", "1")
FILES = ("index.html", "report.md", "scores.csv")
BASE = np.clip(np.random.default_rng(0).normal(0.6, 0.08, PEOPLE), 0, 1)


def record(name, kind="encoder", gain=0.0, seed=0, weights_seed=None, dataset="set", **changes):
    """A record whose Dice is the same people's, a little better or worse."""
    rng = np.random.default_rng([*name.encode(), seed])
    dice = np.clip(BASE + gain + 0.01 * rng.normal(size=PEOPLE), 0, 1)
    flags = {"seen_test_subjects": 0, "seen_test_volumes": 0, "saw_labels": False, "ranked": True}
    encoder = kind == "encoder" and not name.startswith("imagenet:")
    pretraining = {}
    if encoder:
        pretraining = {
            "proxies": {name.split("/")[1].split("-")[0]: {}},
            "steps": changes.pop("steps", 100),
            "compute": {
                "flops_per_step": 10**9,
                "flops_between_epochs": 0,
                "seconds": 60,
                "peak_memory": 10**9,
            },
            "data": {"volumes": changes.pop("volumes", 50), "datasets": [dataset], "digest": "d"},
        }
    contestant = {
        "name": name, "kind": kind, "digest": f"{name}-{weights_seed}",
        "group": "" if kind == "trivial" else "scratch:resnet18",
        "source": name, "architecture": {"name": "resnet18"}, "pretraining": pretraining,
        "norm_recalibrated": False, "weights_seed": weights_seed,
    }  # fmt: skip
    values = {
        "task": "linear-probe/masks", "version": 1, "dataset": [dataset],
        "data_digest": f"data of {dataset}",
        "split": {"how": "house split", "train": {"subjects": 60, "of_subjects": 60, "volumes": 60},
                  "test": {"subjects": PEOPLE, "volumes": PEOPLE}},
        "split_digest": "split", "fraction": 1.0, "repeat": 0, "seed": seed, "contestant": contestant,
        "settings": {"target": "masks", "classes": list(CLASSES), "fractions": "all"}, "main": "dice",
        "scores": {"dice": float(dice.mean()), "dice_1": float(dice.mean())},
        "intervals": {}, "predictions": [
            {"dataset": dataset, "subject": f"s{k}", "id": f"v{k}", "dice": {"1": float(value)}}
            for k, value in enumerate(dice)
        ],
        "flags": flags | changes.pop("flags", {}),
    }  # fmt: skip
    return Result(**{**values, **changes})


def usual(dataset="set"):
    """A table with everything that has to be there."""
    rows = [
        record("runs/alpha-0", gain=0.10, dataset=dataset),
        record("runs/beta-0", gain=0.05, dataset=dataset),
        record("runs/beta-1", gain=0.05, dataset=dataset),
        record("runs/gamma-0", gain=-0.05, dataset=dataset),
        record("imagenet:mobilenet_v2:acs", gain=0.02, dataset=dataset),
        record("intensities and position", "trivial", gain=-0.2, dataset=dataset),
    ]
    return rows + [
        record(f"scratch:resnet18, seed {k}", "untrained", weights_seed=k, dataset=dataset)
        for k in range(5)
    ]


def write(folder, rows):
    for row in rows:
        write_result(row, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    write(root / "first", usual())
    write(root / "other", [record("runs/delta-0", gain=0.3, split_digest="another")])
    write(root / "old", [record("runs/epsilon-0", gain=0.3, version=0)])
    write(root / "prepared", [record("runs/zeta-0", gain=0.3, data_digest="other")])
    write(root / "leaky", [
        record("runs/leak-0", gain=0.25, flags={"seen_test_subjects": 3, "ranked": False}),
        record("runs/voxels-0", gain=0.25, flags={"seen_test_volumes": 2}),
        record("runs/med3d-0", gain=0.2, flags={"saw_labels": True}),
    ])  # fmt: skip
    (root / "broken.json").write_text('{"task": "linear-probe/masks", "contestant": ', encoding="utf-8")
    (root / "speed.json").write_text('{"milliseconds": 3}', encoding="utf-8")
    edited = record("runs/edited-0", gain=0.0)
    edited.scores["dice"] = 0.99
    write(root / "edited", [edited])
    return root


@pytest.fixture(scope="module")
def report(folder):
    return read_report([folder], resamples=400)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    published = tmp_path_factory.mktemp("published") / "p.yaml"
    published.write_text(
        "source: Someone 2020\nfamily: segmentation\nscores:\n  set:\n    Their net: {dice: 0.999}\n",
        encoding="utf-8",
    )
    out = tmp_path_factory.mktemp("report")
    words = ["leaderboard", "report", str(folder), "--out", str(out), "--resamples", "400"]
    assert main([*words, "--published", str(published)]) == 0
    return out


def arms(report):
    return {arm.label: arm for arm in report.boards[0].arms}


def test_ranks_are_those_of_the_scores(report):
    assert [arm.label for arm in report.boards[0].ranked()] == [
        "alpha", "beta", "ImageNet mobilenet_v2:acs", "untrained", "gamma",
    ]  # fmt: skip
    found = arms(report)
    assert found["alpha"].rank_interval == (1, 1) and found["alpha"].first_share == 1
    assert found["beta"].seeds == 2 and found["untrained"].seeds == 5
    assert found["intensities and position"].rank is None


def test_differences_are_found_and_corrected(report):
    found = arms(report)
    assert found["alpha"].gain.value == pytest.approx(0.10, abs=0.01)
    assert found["alpha"].gain.low < 0.10 < found["alpha"].gain.high or found["alpha"].gain.error < 0.004
    assert found["alpha"].p_holm < 0.001 and found["gamma"].p_holm < 0.001 and found["gamma"].gain.value < 0
    assert found["alpha"].over_imagenet.value == pytest.approx(0.08, abs=0.01)
    assert all(arm.p_holm >= arm.gain.p for arm in found.values() if arm.p_holm is not None)
    assert report.boards[0].detectable < 0.03


def test_what_cannot_be_compared_is_refused_by_name(report):
    why = {(one.where.split("/")[0], one.who): one.why for one in report.records.refused}
    assert "another split" in why["other", "runs/delta-0"]
    assert "task version 0, the table has 1" in why["old", "runs/epsilon-0"]
    assert "preprocessing differ" in why["prepared", "runs/zeta-0"]
    assert "edited" in why["edited", "runs/edited-0"] and "it says 0.9900" in why["edited", "runs/edited-0"]
    assert "not readable" in why["broken.json", ""]
    assert len(why) == 5  # the JSON of something else is no record, and nothing to complain of


def test_leaks_are_shown_and_not_ranked_and_labels_apart(report):
    found = arms(report)
    assert found["leak"].rank is None and "saw 3 test subjects" in found["leak"].why_unranked
    assert found["voxels"].rank is None and "saw 2 test volumes" in found["voxels"].why_unranked
    assert found["med3d"].rank == 1 and found["med3d"].section == "labels"
    assert found["alpha"].rank == 1 and found["alpha"].section == "main"
    assert found["leak"].gain is not None and found["leak"].p_holm is None  # shown, not tested
    assert "leak" not in " ".join(answer(report.boards))


def test_the_answer_in_words(report):
    text = " ".join(answer(report.boards))
    assert "Segmentation (linear-probe): yes on 1 of 1 table." in text and "By chance" not in text
    assert "By chance alone, up to 0.15 of 3 tables would" in " ".join(answer(report.boards * 3))
    assert re.search(r"alpha \+0\.\d+|med3d \+0\.\d+", text)
    assert "is significantly worse than the same network untrained on set (" in text and "gamma" in text
    head = "Compared with the best ImageNet conversion, some pretrained encoder is significantly"
    assert f"{head} better on 1 of 1 table (" in text


class Page(html.parser.HTMLParser):
    """Checks that tags close, and collects what is loaded."""

    VOID = {"meta", "img", "br", "hr", "input", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.images, self.rows, self.ids = [], [], [], [], []
        self.cell = None

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [attrs[key] for key in ("src", "srcset", "data", "action") if key in attrs]
        if tag in ("link", "use", "iframe", "object") or (tag == "a" and not attrs["href"].startswith("#")):
            self.loaded.append(attrs.get("href", tag))
        if tag == "img":
            self.images.append(attrs.get("alt"))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True
        if tag == "small":  # what stands below a name
            self.cell = None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def test_the_page_is_whole_and_loads_nothing(made):
    text = (made / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(one.startswith("data:image/") for one in page.loaded)
    assert all(page.images) and len(set(page.ids)) == len(page.ids)
    assert "http" not in re.sub(r"data:image/[^\"]*", "", text).replace("http-equiv", "")
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert text.count("<caption>") == text.count("<table")


def test_a_printed_matrix_has_the_width_of_the_paper(made):
    """Nobody can scroll paper: columns beyond its edge are lost."""
    page = (made / "index.html").read_text(encoding="utf-8")
    printed = "".join(block for block in page.split("@media print {")[1:])
    assert ".matrix, .matrix table { width: 100%; min-width: 0;" in printed


def test_page_markdown_and_csv_agree(made):
    page = Page()
    page.feed((made / "index.html").read_text(encoding="utf-8"))
    cells = {row[0]: row for row in page.rows if len(row) > 5}
    markdown = (made / "report.md").read_text(encoding="utf-8")
    rows = list(csv.DictReader((made / "scores.csv").open(encoding="utf-8")))
    ours = [row for row in rows if row["kind"] != "published"]
    assert len(ours) == 9
    for row in ours:
        name, score = row["title"], f"{float(row['value']):.3f} [{float(row['low']):.3f}"
        assert cells[name][2].startswith(score)
        line = next(line for line in markdown.splitlines() if f"| {name} |" in line and score in line)
        rank = cells[name][1]
        assert line.startswith(f"| {rank} |") and rank.split(" ")[0].strip(",") in (
            "-", "not", row["rank"].removesuffix(".0"),
        )  # fmt: skip


def test_published_numbers_are_marked_and_neither_ranked_nor_tested(made):
    rows = list(csv.DictReader((made / "scores.csv").open(encoding="utf-8")))
    theirs = next(row for row in rows if row["contestant"] == "Their net")
    assert theirs["kind"] == "published" and theirs["rank"] == theirs["gain_p"] == theirs["low"] == ""
    assert "published: Someone 2020" in theirs["unranked"]
    line = next(
        x for x in (made / "report.md").read_text(encoding="utf-8").splitlines() if "Their net" in x
    )
    assert line.startswith("| published | Their net | 0.999 |")


def test_medmnist_numbers_stand_beside_its_records(tmp_path):
    from ssl3d_benchmarks.leaderboard.report.output import PUBLISHED
    from ssl3d_benchmarks.leaderboard.report.records import read_records

    rng = np.random.default_rng(0)
    target = np.arange(20) % 2
    shares = np.clip(0.5 + 0.2 * (2 * target - 1) + 0.1 * rng.normal(size=20), 0.01, 0.99)
    predictions = [
        {"dataset": "adrenalmnist3d", "subject": f"s{k}", "id": f"v{k}", "target": str(y),
         "probability": [float(1 - p), float(p)]}
        for k, (y, p) in enumerate(zip(target, shares, strict=True))
    ]  # fmt: skip
    pairs = [(p > q) + 0.5 * (p == q) for p in shares[target == 1] for q in shares[target == 0]]
    row = record("runs/a-0", dataset="adrenalmnist3d", task="linear-probe/classes", main="auc",
                 scores={"auc": float(np.mean(pairs))}, predictions=predictions,
                 settings={"target": "classes", "classes": ["0", "1"]})  # fmt: skip
    write(tmp_path, [row])
    (table,) = read_records([tmp_path], [PUBLISHED / "medmnist3d.yaml"]).tables
    assert table.family == "classification" and not read_records([tmp_path]).refused
    assert {one["name"]: one["auc"] for one in table.published}["ResNet-18, ACS"] == 0.839


def test_a_table_without_scratch_and_trivial_rows_says_so(tmp_path):
    out = tmp_path / "out"
    write(tmp_path / "r", [record("runs/alpha-0", gain=0.1), record("runs/beta-0")])
    assert (
        main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "100"]) == 0
    )
    text = (out / "index.html").read_text(encoding="utf-8")
    assert "There is no untrained row" in text and "There is no trivial row" in text
    assert "There is no untrained or from-scratch row" in text and "nothing can be said on set" in text
    assert "**There is no untrained row" in (out / "report.md").read_text(encoding="utf-8")


def test_a_bad_untrained_twin_is_no_straw_man(tmp_path):
    again = [
        record(f"scratch:resnet18, seed {k}, norm recalibrated", "untrained", gain=-0.3, weights_seed=k)
        for k in range(5)
    ]
    for row in again:
        row.contestant["norm_recalibrated"] = True
    tuned = record("runs/alpha-0, norm recalibrated", gain=-0.1)
    tuned.contestant["norm_recalibrated"] = True
    found = arms(read_report([write(tmp_path, [*usual(), *again, tuned])], resamples=200))
    assert found["alpha, norm recalibrated"].gain.value == pytest.approx(-0.1, abs=0.02)


def test_arms_with_a_decoder_stand_beside_those_of_the_encoder_alone(tmp_path):
    rows = usual()
    for seed in (0, 1):
        rows.append(record(f"runs/beta-{seed}, with decoder", gain=0.15))
        rows[-1].contestant["decoder"] = "a digest"
    (board,) = read_report([write(tmp_path / "decoded", rows)]).boards
    found = {arm.label: arm for arm in board.arms}
    assert found["beta"].gain.value == pytest.approx(0.05, abs=0.02)
    assert found["beta, with decoder"].gain.value == pytest.approx(0.15, abs=0.02)
    assert len(found["beta, with decoder"].encoders()) == 2  # the seeds of one contestant
    # Told also where no arm of the encoder alone stands beside it.
    alone = [row for row in rows if row.contestant["name"] not in ("runs/beta-0", "runs/beta-1")]
    (board,) = read_report([write(tmp_path / "alone", alone)]).boards
    assert "beta, with decoder" in {arm.label for arm in board.arms}


def test_encoders_on_the_way_are_a_curve_and_no_rows(tmp_path):
    way = [record(f"runs/alpha-0/encoder-at-{share}", gain=0.05, steps=share) for share in (25, 50)]
    board = read_report([write(tmp_path, [*usual(), *way])], resamples=200).boards[0]
    assert len(board.on_the_way) == 2 and "alpha" in {arm.label for arm in board.ranked()}
    assert [arm.first.flops() for arm in sorted(board.on_the_way, key=lambda a: a.first.share)] == [
        25e9,
        50e9,
    ]
    from ssl3d_benchmarks.leaderboard.report.page import page

    assert "at 0, 25, 50 and 100 % of the pretraining budget" in page("x", [board], [], [], [])


def test_fractions_have_tables_of_their_own_and_a_curve(tmp_path):
    rows = usual()
    for fraction in (0.5, 0.1):
        for repeat in range(3):
            for name, kind, gain, weights_seed in (
                ("runs/alpha-0", "encoder", 0.1, None),
                ("scratch:resnet18, seed 0", "untrained", 0, 0),
                ("scratch:resnet18, seed 1", "untrained", 0, 1),
            ):
                row = record(name, kind, gain - 0.2 * (1 - fraction), weights_seed=weights_seed)
                row.fraction, row.repeat = fraction, repeat
                row.split = {**row.split, "train": {"subjects": int(60 * fraction), "of_subjects": 60}}
                row.settings = {**row.settings, "fractions": f"{fraction} of the training subjects, nested"}
                rows.append(row)
    out = tmp_path / "out"
    made = read_report([write(tmp_path / "r", rows)], resamples=200)
    assert [board.fraction for board in made.boards] == [1.0, 0.5, 0.1]
    assert made.boards[1].arms[0].subsets == 3
    main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "200"])
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "Score against the number of training subjects." in page
    assert "6 of 60 training subjects" in page
    assert re.search(
        r"Segmentation with few labels \(linear-probe\): yes on [^.]*\.[^.]*set, (30|6) of 60", page
    )


def labelled(people, alpha, scratch):
    """Records on three subsets of so many of 60 subjects: of one pretrained encoder, two from scratch."""
    for repeat in range(3):
        for name, kind, gain, weights_seed in (
            ("runs/alpha-0", "encoder", alpha, None),
            ("scratch:resnet18, seed 0", "untrained", scratch, 0),
            ("scratch:resnet18, seed 1", "untrained", scratch, 1),
        ):
            if gain is not None:
                row = record(
                    name, kind, gain + 1e-3 * repeat, weights_seed=weights_seed, seed=weights_seed or 0
                )
                row.fraction, row.repeat = people / 60, repeat
                row.split = {**row.split, "train": {"subjects": people, "of_subjects": 60}}
                row.settings = {**row.settings, "fractions": f"{people}, nested"}
                yield row


def test_a_gain_is_told_in_labelled_subjects(tmp_path):
    # From scratch -.20, -.10 and -.06 with 6, 24 and 54 subjects; pretrained -.15 with 6, which is half of
    # the way from 6 to 24 on a logarithmic axis: 12.
    rows = [*labelled(6, -0.15, -0.2), *labelled(24, -0.02, -0.1), *labelled(54, None, -0.06)]
    boards = read_report([write(tmp_path / "r", rows)], resamples=400).boards
    few, more = worths(boards)
    gain = few.arm.gain
    scratch = {board.fraction: board.of_kind("scratch")[0].interval.value for board in boards}
    rise = scratch[24 / 60] - scratch[6 / 60]
    assert (few.labelled, few.most) == (6, 54) and few.equal == pytest.approx(12, abs=0.5)
    for end, of_gain in ((few.low, gain.low), (few.equal, gain.value), (few.high, gain.high)):
        assert end == pytest.approx(6 * 4 ** (of_gain / rise), rel=1e-6)
    assert more.labelled == 24 and more.equal == float("inf")
    lines = answer(boards)
    (line,) = [words for words in lines if "with 6 labelled subjects" in words]
    low, high = f"{few.low:.0f}", f"{few.high:.0f}"
    assert f"reaches that with 12 [{low}, {high}] labelled subjects" in line
    assert f"p {p_text(few.arm.p_holm)} after Holm" in line
    assert "pretraining (alpha) lifts dice from" in line
    (line,) = [words for words in lines if "with 24 labelled subjects" in words]
    assert "reaches that with more than 54" in line
    out = tmp_path / "out"
    assert (
        main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "400"]) == 0
    )
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<title>alpha with 6 labelled subjects: from scratch 12</title>" in page
    assert "<title>alpha with 24 labelled subjects: from scratch more than 54</title>" in page


def test_no_gain_is_told_as_none(tmp_path):
    rows = [*labelled(6, -0.2, -0.2), *labelled(24, None, -0.1)]
    boards = read_report([write(tmp_path, rows)], resamples=400).boards
    (line,) = [words for words in answer(boards) if "with 6 labelled subjects" in words]
    assert "no gain is shown: dice is 0." in line and "lifts" not in line and "reaches" not in line


@pytest.mark.parametrize(
    ("curve", "score", "equal"),
    [
        ([(4, 0.7), (8, 0.6), (16, 0.8)], 0.75, 8 * 2**0.75),  # it falls before it rises
        ([(4, 0.7), (8, float("nan")), (16, 0.8)], 0.75, 8),  # an undefined score is no point
        ([(2, 0.9), (4, 0.7), (16, 0.8)], 0.75, 8),  # fewer labels than those it begins at are left out
        ([(4, 0.7)], 0.6, 4), ([(4, 0.7)], 0.8, float("inf")),
    ],
)  # fmt: skip
def test_the_same_score_is_found_from_the_number_on(curve, score, equal):
    assert equal_labels(curve, 4, score) == pytest.approx(equal)


def on_subsets(name, kind, gain, luck, **changes):
    """A contestant's records on subsets of half the training subjects, some of them better ones."""
    for repeat, lucky in enumerate(luck):
        row = record(name, kind, gain + lucky, seed=repeat, **changes)
        row.fraction, row.repeat, row.seed = 0.5, repeat, 0
        row.settings = {**row.settings, "fractions": "0.5 of the training subjects, nested"}
        yield row


def test_a_subset_that_is_hard_for_all_changes_no_rank(tmp_path):
    luck = (0.0, 0.06, -0.06)
    rows = [
        *on_subsets("runs/alpha-0", "encoder", 0.02, luck),
        *on_subsets("scratch:resnet18, seed 0", "untrained", 0.0, luck, weights_seed=0),
        *on_subsets("scratch:resnet18, seed 1", "untrained", 0.0, luck, weights_seed=1),
    ]
    board = read_report([write(tmp_path, rows)], resamples=400).boards[0]
    alpha, untrained = board.arms
    assert alpha.interval.low < untrained.interval.value  # each for itself is uncertain
    assert alpha.gain.p < 0.05
    assert alpha.first_share > 0.98 and untrained.rank_interval == (2, 2)


def test_two_subsets_do_not_tell_what_could_be_detected(tmp_path):
    rows = [
        *on_subsets("runs/alpha-0", "encoder", 0.02, (0.0, 0.1)),
        *on_subsets("scratch:resnet18, seed 0", "untrained", 0.0, (0.0, 0.0), weights_seed=0),
    ]
    assert main(["leaderboard", "report", str(write(tmp_path / "r", rows)), "--out", str(tmp_path)]) == 0
    board = read_report([tmp_path / "r"], resamples=400).boards[0]
    assert board.detectable is None
    assert any("No smallest detectable gain" in note for note in board.notes)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split(" | ") for line in lines]
    header = next(row for row in cells if "detectable gain" in row)
    row = next(row for row in cells if "alpha" in row)
    assert row[header.index("detectable gain")].strip() == ""


def test_one_seed_against_several_takes_their_variance(report):
    found = arms(report)
    assert found["alpha"].gain.borrowed and not found["beta"].gain.borrowed
    assert any("is taken to vary as much as those" in note for note in report.boards[0].notes)


def test_numbers_of_annotated_slices_have_tables_of_their_own_and_a_curve(tmp_path):
    rows = []
    for count in (0, 1, 2):
        for row in usual():
            row.settings = {**row.settings, "task": {"sparse_slices": count, "annotated": {"a": [count]}}}
            rows.append(row)
    out = tmp_path / "out"
    made = read_report([write(tmp_path / "r", rows)], resamples=200)
    assert [board.table.slices for board in made.boards] == [0, 1, 2]
    assert [board.table.number for board in made.boards] == [0, 0, 0]
    assert made.boards[1].table.title.endswith(", 1 annotated slice a volume")
    main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "200"])
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count(">annotated slices of each training volume<") == 1
    ticks = re.findall(r'y="[\d.]+" text-anchor="middle">(\w+)</text>', page)
    assert [tick for tick in ticks if tick in ("1", "2", "4", "5", "all")][-3:] == ["1", "2", "all"]
    assert "2 annotated slices a volume" in (out / "report.md").read_text(encoding="utf-8")


def test_ranks_over_six_tasks_have_a_critical_difference(tmp_path):
    rows = [row for k in range(6) for row in usual(f"set{k}")]
    made = read_report([write(tmp_path, rows)], resamples=200)
    (overall,) = made.overall
    assert len(overall.boards) == 6 and overall.methods[0].startswith("alpha")
    np.testing.assert_allclose(overall.average, [1, 2, 3, 4, 5])
    assert overall.changes < 0.1 and overall.tau > 0.95 and overall.first_share[0] == 1
    assert overall.above[0, 1:].min() == 1 and overall.critical is not None
    five = read_report(
        [write(tmp_path / "five", [row for k in range(5) for row in usual(f"set{k}")])], resamples=200
    )
    assert five.overall[0].critical is None


def test_friedman_and_nemenyi_are_the_textbooks():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 12)) + np.arange(4)[:, None]
    order = np.argsort(-scores.mean(axis=1))
    from ssl3d_benchmarks.leaderboard.report.statistics import ranks_of

    found = critical_difference(ranks_of(scores[order]))
    assert found.p == pytest.approx(friedmanchisquare(*scores).pvalue)
    # Demšar 2006, table 5: q = 2.569 for four classifiers.
    assert found.difference == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 12)), abs=0.002)


def test_the_same_record_twice_counts_once(tmp_path):
    write(tmp_path / "a", usual())
    write(tmp_path / "b", usual()[:2])
    made = read_report([tmp_path], resamples=200)
    assert not made.records.refused and len(made.records.tables[0].rows) == len(usual())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", "nowhere"], "nowhere: no such folder of records"),
        (["report", "."], "no record of a benchmark"),
        (["report"], "results"),
        (["report", ".", "--resamples", "7"], "at least 100"),
        (
            ["report", ".", "--published", "nobody"],
            "--published nobody: no such file, and none of medmnist3d",
        ),
        (["repot"], "'repot' is none of run, report"),
    ],
)
def test_bad_input_is_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["leaderboard", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_wrong_file_of_published_numbers_is_told(folder, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("scores: 3\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"p\.yaml: published numbers need source"):
        read_report([folder], [str(path)])


def test_out_is_a_file(folder, tmp_path, capsys):
    (tmp_path / "f").write_text("x", encoding="utf-8")
    assert main(["leaderboard", "report", str(folder), "--out", str(tmp_path / "f")]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_a_full_disk_is_named_with_what_cannot_be_written(folder, tmp_path, monkeypatch, capsys):
    from ssl3d_benchmarks.task import write_table

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["leaderboard", "report", str(folder), "--out", str(tmp_path / "r")]) == 3
    assert f"--out {tmp_path / 'r'}: No space left" in capsys.readouterr().err
    with pytest.raises(TransientError, match=r"cannot write .*table\.txt: No space left"):
        write_table(tmp_path, "a table")


@pytest.mark.parametrize("words", [["--help"], ["report", "--help"]])
def test_help_imports_no_torch(words):
    code = (
        "import sys\nfrom ssl3d.cli import main\n"
        f"try:\n    main(['leaderboard', *{words!r}])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "report" in done.stdout


def test_a_record_of_other_content_is_not_read(tmp_path):
    from ssl3d.api import read_result

    (tmp_path / "x.json").write_text(json.dumps({"task": 1, "contestant": 2}), encoding="utf-8")
    with pytest.raises(DataError):
        read_result(tmp_path / "x.json")
    with pytest.raises(UsageError, match="no record of a benchmark"):
        read_report([tmp_path])


# Who is who ---------------------------------------------------------------------------------------


def trained(row, digest="", **pretraining):
    """A record with more said of its pretraining."""
    row.contestant["pretraining"].update(pretraining)
    row.contestant["digest"] = digest or row.contestant["digest"]
    return row


def on(data, rows):
    """Encoders that were all trained on one data set."""
    return [
        trained(row, data={"volumes": 50, "datasets": [data], "digest": data})
        if row.contestant["pretraining"]
        else row
        for row in rows
    ]


def test_an_encoder_is_one_method_whatever_it_was_trained_on(tmp_path):
    rows = [row for k in range(3) for row in on("set0", usual(f"set{k}"))]
    (overall,) = read_report([write(tmp_path, rows)], resamples=100).overall
    assert len(overall.methods) == 5 and not overall.left_out and not overall.tasks_left_out
    assert "alpha, on set0" in overall.methods


def test_own_data_stands_where_every_task_has_its_own_encoder(tmp_path):
    rows = []
    for k in range(3):
        rows += on(
            f"set{k}", [trained(row, f"{row.contestant['digest']} of {k}") for row in usual(f"set{k}")]
        )
    # Another encoder of that proxy, on one task alone: it stands for none of the others.
    rows += on("set7", [trained(record("runs/alpha-0", gain=0.2, dataset="set1"), "other")])
    (overall,) = read_report([write(tmp_path, rows)], resamples=100).overall
    assert "alpha, own data" in overall.methods and len(overall.methods) == 5
    assert overall.left_out == ["alpha, on set7, resnet18 (on 1 of 3)"]


def test_a_task_of_few_contestants_is_left_out_by_name_and_not_the_contestants(tmp_path):
    rows = [row for k in range(3) for row in on("set0", usual(f"set{k}"))]
    rows += on("set0", [record("runs/alpha-0", gain=0.1, dataset="tiny")])
    out = tmp_path / "out"
    (overall,) = read_report([write(tmp_path / "r", rows)], resamples=100).overall
    assert len(overall.methods) == 5 and overall.tasks_left_out == ["tiny: linear-probe, masks"]
    main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "100"])
    for name in ("index.html", "report.md"):
        assert "other tasks share: tiny: linear-probe, masks." in (out / name).read_text(encoding="utf-8")


def test_it_is_said_why_there_are_no_ranks_over_tasks(tmp_path, capsys):
    out = tmp_path / "out"
    rows = on("a", [record("runs/alpha-0", dataset="a"), record("runs/beta-0", dataset="a")])
    rows += on("b", [record("runs/gamma-0", dataset="b"), record("runs/delta-0", dataset="b")])
    write(tmp_path / "r", rows)
    assert (
        main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "100"]) == 0
    )
    words = "There are no ranks over tasks for segmentation (linear-probe), because no two of the 2 tasks"
    assert words in capsys.readouterr().out
    assert words in (out / "index.html").read_text(encoding="utf-8")
    assert words in (out / "report.md").read_text(encoding="utf-8")


def test_other_contestants_are_no_seeds_of_one(tmp_path):
    rows = [
        trained(
            record(f"runs/simclr-{size}-{seed}", gain=0.1), f"{size} {seed}", batch_size=size, seed=seed
        )
        for size in (16, 32)
        for seed in (0, 1)
    ]
    for row in rows:  # named by their batch size alone, as `NAME=ENCODER` can be
        row.contestant["name"] = row.contestant["name"].rpartition("-")[0]
    rows += [
        trained(record(f"runs/swav-{k}", gain=0.1), batch_size=8, seed=0, lr=lr)
        for k, lr in enumerate((0.1, 0.2))
    ]
    rows += [trained(record(f"runs/mae-{seed}", gain=0.1), batch_size=8, seed=seed) for seed in (3, 4)]
    # What the number means is not recorded; the seed it is not.
    rows += [trained(record(f"runs/byol-{crop}", gain=0.1), batch_size=8, seed=0) for crop in (24, 48)]
    found = arms(read_report([write(tmp_path, [*usual(), *rows])], resamples=100))
    assert found["simclr, batch 16"].seeds == 2 and found["simclr, batch 32"].seeds == 2
    assert found["swav, rate 0.1"].seeds == 1 and found["swav, rate 0.2"].seeds == 1
    assert found["mae"].seeds == 2 and found["beta"].seeds == 2
    assert found["byol, byol-24"].seeds == found["byol, byol-48"].seeds == 1


def test_another_beginning_is_another_contestant_and_every_seed_may_have_its_own(tmp_path):
    rows = [
        trained(record(f"runs/simclr-{seed}"), f"{start} {seed}", batch_size=8, seed=seed,
                init=start and {"from": f"{start}-{seed}/encoder", "steps": 7})
        for start in ("", "runs/mae")
        for seed in (0, 1)
    ]  # fmt: skip
    found = arms(read_report([write(tmp_path, [*usual(), *rows])], resamples=100))
    assert found["simclr"].seeds == 2 and found["simclr, after mae"].seeds == 2


def test_a_record_too_old_to_tell_its_recipe_is_a_seed_of_those_that_do(tmp_path):
    rows = [record("runs/simclr-0"), trained(record("runs/simclr-1"), batch_size=8, lr=0.1, seed=1)]
    found = arms(read_report([write(tmp_path, [*usual(), *rows])], resamples=100))
    assert found["simclr"].seeds == 2
    less = trained(record("runs/simclr-2"), batch_size=8, seed=2)
    less.contestant["pretraining"]["data"]["chosen_by"] = "subject"  # which no record of before says
    found = arms(read_report([write(tmp_path, [less])], resamples=100))
    assert found["simclr"].seeds == 3
    other = trained(record("runs/simclr-3"), batch_size=8, seed=3, lr=0.5)  # now it may be of either
    found = arms(read_report([write(tmp_path, [other])], resamples=100))
    assert sorted(arm.seeds for name, arm in found.items() if name.startswith("simclr")) == [1, 1, 1, 1]


def test_what_a_checkpoint_says_of_its_beginning_and_recipe_is_in_the_record(tmp_path):
    from ssl3d.api import encoder_from
    from ssl3d_benchmarks.contestants import Entry, described

    encoder = encoder_from("scratch:resnet10:width=4", seed=0)
    said = {"init": {"from": "imagenet:mobilenet_v2:acs", "steps": None}, "batch_size": 16, "lr": 0.002}
    encoder.metadata |= {"steps": 100, "proxies": {"simclr": {}}, **said, "optimizer": "sgd", "seed": 7}
    own = described(Entry("runs/x-0", "encoder", "scratch:resnet18", None, "x"), encoder, {}).described()
    assert own["pretraining"].items() >= {**said, "optimizer": "sgd", "seed": 7}.items()
    row = record("runs/simclr-0")
    row.contestant["pretraining"] |= own["pretraining"]
    assert "simclr after ImageNet" in arms(read_report([write(tmp_path, [*usual(), row])], resamples=100))


def test_a_trivial_row_of_a_newer_version_refuses_no_network(tmp_path):
    rows = usual()
    rows[5].version = 2
    made = read_report([write(tmp_path, rows)], resamples=100)
    assert len(made.boards[0].ranked()) == 5
    (refused,) = made.records.refused
    assert refused.who == "intensities and position" and "version 2, the table has 1" in refused.why


# What must not be credited ------------------------------------------------------------------------


def test_the_answer_credits_no_encoder_pretrained_with_labels(tmp_path):
    plain = usual()
    for row in plain:
        if row.contestant["kind"] == "encoder" and row.contestant["pretraining"]:
            like = record("runs/gamma-0", gain=0.001)  # not told from untrained: its p is not 0
            row.predictions, row.scores = like.predictions, like.scores
    before = arms(read_report([write(tmp_path / "a", plain)], resamples=200))
    labelled = record("runs/med3d-0", gain=0.2, flags={"saw_labels": True})
    weak = record("runs/weak-0", gain=0.001, flags={"saw_labels": True})
    made = read_report([write(tmp_path / "b", [*plain, labelled, weak])], resamples=200)
    found = arms(made)
    lines = answer(made.boards)
    assert re.fullmatch(
        r"Segmentation \(linear-probe\): no gain is shown on set \(detects gains from 0\.\d+\)\.", lines[0]
    )
    assert "significantly better on 0 of 1 table and some" in " ".join(lines)
    head = "Segmentation (linear-probe): an encoder pretrained with labels, which is ranked apart, is"
    assert lines[-1].startswith(head)
    assert "better than the same network untrained on 1 of 1 table (set (Med3D))" in lines[-1]
    from ssl3d_benchmarks.leaderboard.report.overview import in_short

    # The matrix has its gain, so the first sentence does not pass it over in silence.
    first = in_short(made.boards)[0]
    assert "no pretrained encoder is shown better" in first
    assert (
        "A network pretrained with labels, as on ImageNet, is better on 1 table; the largest gain is Med3D"
        in first
    )
    assert {k: v.p_holm for k, v in before.items()} == {
        k: v.p_holm for k, v in found.items() if v.section == "main"
    }  # a family of tests of their own


def test_the_answer_says_where_nothing_is_known_of_what_could_be_shown(tmp_path):
    rows = [record(f"runs/alpha-{k}", gain=0.02 * k) for k in range(2)]
    rows += [record(f"scratch:resnet18, seed {k}", "untrained", weights_seed=k) for k in range(2)]
    board = read_report([write(tmp_path, rows)], resamples=200).boards[0]
    assert board.detectable is None
    words = " There are too few subjects, seeds or subsets to say how small a gain would be detected {}."
    assert answer([board])[0].endswith("on set." + words.format("there"))
    known = read_report([write(tmp_path / "b", usual())], resamples=200).boards[0]
    for arm in known.arms:
        arm.p_holm = None  # nothing is shown
    (line,) = [line for line in answer([board, known]) if "no gain" in line]
    assert line.endswith(words.format("where no number is given")) and " (detects gains from 0." in line


def test_the_answer_says_where_no_network_is_needed(tmp_path):
    rows = [row for row in usual() if row.contestant["kind"] != "trivial"]
    easy = record("shape features", "trivial", gain=0.15)
    (board,) = read_report([write(tmp_path / "a", [*rows, easy])], resamples=200).boards
    line = answer([board])[-1]
    assert re.match(
        r"A row without a network is better than every network on 1 of 1 table: "
        r"set \(shape features 0\.7\d+, best network 0\.\d+\)\. ",
        line,
    )
    (board,) = read_report([write(tmp_path / "b", usual())], resamples=200).boards
    assert not any("without a network" in line for line in answer([board]))
    assert re.search(r"alpha \+0\.\d{3} \[\+0\.\d{3}, \+0\.\d{3}\]", answer([board])[0])


def finetuned(name, kind="encoder", rates=(0.001,), **changes):
    """A record of fine-tuning, with a curve over steps."""
    row = record(name, kind, weights_seed=0 if kind == "untrained" else None, **changes)
    row.task = "finetune-segmentation/masks"
    row.settings = {"task": {"classes": [0, 1]}, "training": {"steps": 3}, "rates": list(rates)}
    if kind == "trivial":
        row.settings |= {"training": {}, "rates": []}
    for one in row.predictions:
        one |= {"hd95": {"1": 1.0}, "surface_dice": {"1": 0.5}}
    row.compute = {"details": [{"curve": [{"step": k, "score": 0.1 * k} for k in (1, 2, 3)]}]}
    return row


def test_unequal_tuning_is_said_loudly(tmp_path):
    def made(folder, rates):
        rows = [finetuned("runs/alpha-0", rates=rates), finetuned("scratch:resnet18", "untrained")]
        return read_report([write(folder, [*rows, finetuned("average mask", "trivial")])], resamples=100)

    words = "learning rates tried: 6 for alpha; 1 for from scratch."
    assert any(words in line for line in made(tmp_path / "a", [1, 2, 3, 4, 5, 6]).boards[0].missing)
    assert made(tmp_path / "b", [0.002]).boards[0].missing == []  # as many, though another
    out = tmp_path / "out"
    main(["leaderboard", "report", str(tmp_path / "a"), "--out", str(out), "--resamples", "100"])
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count(words) == 1 and "Unequal tuning: set: finetune-segmentation, masks." in page


def test_what_saw_test_subjects_is_in_no_curve_and_no_picture(tmp_path):
    from PIL import Image

    leak = {"seen_test_subjects": 3, "ranked": False}
    rows = [
        finetuned("scratch:resnet18", "untrained"),
        finetuned("average mask", "trivial"),
        trained(finetuned("runs/leak-0", gain=0.3, flags=leak), data={"volumes": 500, "datasets": ["x"]}),
        trained(finetuned("runs/alpha-0", gain=0.1), data={"volumes": 50, "datasets": ["x"]}),
        trained(finetuned("runs/beta-0", gain=0.0, steps=900), data={"volumes": 5, "datasets": ["x"]}),
    ]
    folder = write(tmp_path, rows)
    for row in rows:
        Image.new("RGB", (4, 4)).save(folder / f"{row.filename[:10]}-masks-{row.key[:8]}.png")
    from ssl3d_benchmarks.leaderboard.report import figures

    (board,) = read_report([folder], resamples=100).boards
    for chart in (figures.steps, figures.compute, figures.data):
        assert "alpha" in chart(board) and "leak" not in chart(board)
    pictures = figures.pictures(board)
    assert 'alt="alpha: predictions' in pictures and 'alt="from scratch: predictions' in pictures
    assert "leak" not in pictures and "leak" in figures.forest(board)


def test_detection_is_compared_with_from_scratch(tmp_path):

    rows = [finetuned("runs/alpha-0", gain=0.2), finetuned("scratch:resnet18", "untrained")]
    (board,) = read_report([write(tmp_path, rows)], resamples=100).boards
    board.table = dataclasses.replace(board.table, task="finetune-detection/boxes")
    text = " ".join(answer([board]))
    assert "Detection (finetune-detection): yes on 1" in text
    assert "significantly better than the same network from scratch" in text
    assert "untrained" not in text


# Columns and scores -------------------------------------------------------------------------------


def test_a_column_is_one_line_and_is_in_page_markdown_and_csv(folder, tmp_path, monkeypatch):
    from ssl3d_benchmarks.leaderboard.report import columns

    batch = columns.Column(
        "letters",
        lambda board, arm: len(arm.label),
        "letters of {score}",
        lambda board, arm: f"{len(arm.label)} of them",
    )
    monkeypatch.setattr(columns, "COLUMNS", (*columns.COLUMNS, batch))
    assert main(["leaderboard", "report", str(folder), "--out", str(tmp_path), "--resamples", "100"]) == 0
    page, markdown, table = ((tmp_path / name).read_text(encoding="utf-8") for name in FILES)
    assert ">letters of dice</th>" in page and ' data-v="5">5 of them</td>' in page
    assert "| letters of dice |" in markdown and "| 5 of them |" in markdown
    rows = {row["contestant"]: row for row in csv.DictReader(table.splitlines())}
    assert rows["alpha"]["letters"] == "5" and rows["gamma"]["letters"] == "5"


def test_keys_of_columns_are_unique_and_so_are_the_headings_of_a_table(report):
    from ssl3d_benchmarks.leaderboard.report.columns import csv_columns, shown_columns

    keys = [column.key for column in csv_columns(report.boards)]
    headings = [column.heading_on(report.boards[0]) for column in shown_columns()]
    for names in (keys, headings):
        assert len(set(names)) == len(names) and all(name == name.strip() for name in names)


def test_every_score_of_a_task_is_shown_and_its_absence_too(tmp_path):
    names = ["dice_1", "hd95", "hd95_1", "surface_dice", "surface_dice_1"]
    rows = usual()
    for row in rows:
        luck = 0.2 * (row.contestant["name"] == "runs/beta-1")
        row.scores |= {name: 0.1 * k + luck for k, name in enumerate(names, 1)}
        if row.contestant["kind"] == "trivial":
            del row.scores["hd95"]
    out = tmp_path / "out"
    write(tmp_path / "r", rows)
    assert (
        main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "100"]) == 0
    )
    page, markdown, table = ((out / name).read_text(encoding="utf-8") for name in FILES)
    head = "| contestant | dice | dice_1 | hd95 ↓ | hd95_1 ↓ | surface_dice | surface_dice_1 |"
    assert head in markdown
    of_beta = "0.200 | 0.300 | 0.400 | 0.500 | 0.600 |"  # mean of two seeds
    below = markdown.partition(head)[2].splitlines()
    assert next(line for line in below if line.startswith("| beta |")).endswith(of_beta)
    trivial = next(line for line in below if line.startswith("| intensities and position |"))
    assert trivial.endswith("| – | 0.300 | 0.400 | 0.500 |")
    assert (
        "<summary>All scores: dice, dice_1, hd95 ↓, hd95_1 ↓, surface_dice, surface_dice_1</summary>"
        in page
    )
    assert ">0.600</td>" in page and ">–</td>" in page
    cells = {row["contestant"]: row for row in csv.DictReader(table.splitlines())}
    assert float(cells["beta"]["score_surface_dice_1"]) == pytest.approx(0.6)
    assert cells["intensities and position"]["score_hd95"] == ""


def test_published_scores_beside_the_main_one_are_shown(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "source: Someone 2020\nfamily: segmentation\nscores:\n  set:\n"
        "    Net: {dice: 0.999, dice_1: 0.321}\n",
        encoding="utf-8",
    )
    write(tmp_path / "r", usual())
    words = ["leaderboard", "report", str(tmp_path / "r"), "--out", str(tmp_path), "--resamples", "100"]
    assert main([*words, "--published", str(path)]) == 0
    assert "| Net | 0.999 | 0.321 |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_style_has_a_colour_for_every_curve():
    from ssl3d.api import beside, charts

    colours = set(re.findall(r"svg \.c(\d+) ", beside("ssl3d.pages", "page.css")))
    assert colours == {str(k) for k in range(charts.COLOURS)}


# How it looks -------------------------------------------------------------------------------------


def test_encoders_pretrained_with_labels_have_a_table_of_their_own(made):
    text = (made / "index.html").read_text(encoding="utf-8")
    page, own = text.split("<h3>Pretrained with labels: ranked among themselves</h3>")
    assert "Med3D" not in re.findall(r'<th scope="row" data-v="([^"]*)"', page)
    assert re.findall(r'<th scope="row" data-v="([^"]*)"', own)[0] == "Med3D"
    assert "1 (1–1), with labels" in own


def test_labels_of_test_subjects_are_a_leak_and_of_whom_must_be_known(tmp_path):
    rows = [
        record("runs/seen-0", flags={"saw_labels": True, "seen_test_subjects": 2, "ranked": False}),
        record("runs/dark-0", flags={"saw_labels": True, "seen_test_volumes": None}),
        trained(record("runs/known-0", flags={"saw_labels": True, "seen_test_volumes": None})),
    ]
    rows[2].contestant["identities_seen"] = 12
    made = read_report([write(tmp_path, [*usual(), *rows])], resamples=100)
    found = arms(made)
    assert found["seen"].rank is None and found["seen"].section == "main"
    assert found["seen"].why_unranked == "pretraining saw 2 test subjects, and learned from labels"
    assert any("unknown whether dark learned from labels of test" in note for note in made.boards[0].notes)


def test_notes_stand_below_the_name_and_numbers_of_others_are_explained_once(made):
    text = (made / "index.html").read_text(encoding="utf-8")
    assert re.search(r'data-v="leak">.*?</details><small>NOT RANKED: pretraining saw 3 test subjects', text)
    assert re.search(r'data-v="beta"><details><summary>beta</summary>.*?</details><small>2 seeds<', text)
    assert ">notes<" not in text and text.count("Published: Someone 2020") == 1


def test_cells_sort_by_numbers_or_words_and_what_has_neither_is_last():
    from ssl3d.api import beside
    from ssl3d.pages.elements import Cell, Row, table

    cells = [Cell("1 seed", "1 seed"), Cell("-"), Cell(".5", 0.5), Cell("–", float("nan"))]
    page = table("c", ["name", "about", "rank", "x", "y"], [Row("row", cells)])
    assert re.findall(r'<td[^>]* data-v="([^"]*)"', page) == ["1 seed", "", "0.5", ""]
    assert "if (x === '' || y === '') return (x === '') - (y === '');" in beside("ssl3d.pages", "page.js")


def test_ranks_between_two_places_are_not_rounded(report):
    from ssl3d_benchmarks.leaderboard.report.columns import rank_text

    arm = arms(report)["alpha"]
    before = arm.rank, arm.rank_interval
    arm.rank, arm.rank_interval = 26.5, (25.5, 26.5)
    assert rank_text(arm) == "26.5 (25.5–26.5)"
    arm.rank, arm.rank_interval = before


def test_tables_of_one_title_say_what_differs(tmp_path):
    rows = []
    for steps, width in ((3, 16), (500, 32)):
        for row in (finetuned("runs/alpha-0"), finetuned("scratch:resnet18", "untrained")):
            row.settings = {**row.settings, "training": {"steps": steps, "lots": [1, 2], "same": 7}}
            row.contestant["group"] = f"scratch:resnet18:width={width}"
            rows.append(row)
    out = tmp_path / "out"
    tables = read_report([write(tmp_path / "r", rows)], resamples=100).records.tables
    assert sorted(table.differs for table in tables) == [
        "network resnet18:width=16, steps 3", "network resnet18:width=32, steps 500",
    ]  # fmt: skip
    main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "100"])
    for name in ("index.html", "report.md"):
        assert "This table has: network resnet18:width=16, steps 3." in (out / name).read_text(
            encoding="utf-8"
        )


def test_the_names_of_a_critical_difference_are_outside_of_its_stems():
    from ssl3d.pages.charts import critical

    names = [f"a method of a long name, {k}" for k in range(7)]
    picture = critical(names, [1.2, 2, 3, 4, 5, 6, 6.8], 2.5, [(0, 2)], "t")
    stems = [float(x) for found in re.findall(r'"stem" points="([^"]*)"', picture)
             for x in re.findall(r"([\d.]+),", found)]  # fmt: skip
    left, right = (
        [float(x) for x in re.findall(rf'class="name" x="([\d.]+)"[^>]*"{side}"', picture)]
        for side in ("end", "start")
    )
    assert len(left) == 4 and len(right) == 3
    assert max(left) < min(stems) and min(right) > max(stems)
    assert min(left) > 6 * len(names[0])  # they fit


def test_an_axis_of_few_amounts_has_their_ticks_and_room_for_its_name():
    from ssl3d.pages.charts import Line, lines

    points = [(x, y, y, y) for x, y in ((4, 0.8125), (8, 0.815), (16, 0.8175))]
    picture = lines([Line("a", points)], "people", "dice", "t", log=True, called={16: "all"})
    below = re.findall(r'y="[\d.]+" text-anchor="middle">([\w.]+)</text>', picture)
    assert below == ["4", "8", "all", "people"]
    ticks = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">([\d.]+)</text>', picture)
    assert max(len(words) for _, words in ticks) >= 5
    assert all(
        float(x) - 7 * len(words) > 13 + 4 for x, words in ticks
    )  # the name's place, half its height


def test_trivial_rows_that_lack_are_named(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for name, kind in (("runs/a-0", "encoder"), ("volume only", "trivial"), ("pooled voxels", "trivial")):
        shares = rng.uniform(0.01, 0.99, 20)
        predictions = [
            {"dataset": "set", "subject": f"s{k}", "id": f"v{k}", "target": str(k % 2),
             "probability": [float(1 - p), float(p)]}
            for k, p in enumerate(shares)
        ]  # fmt: skip
        auc = float(np.mean([p > q for p in shares[1::2] for q in shares[::2]]))
        settings = {"target": "classes", "classes": ["0", "1"]}
        rows.append(record(name, kind, task="linear-probe/classes", main="auc", scores={"auc": auc},
                           predictions=predictions, settings=settings))  # fmt: skip
    (board,) = read_report([write(tmp_path, rows)], resamples=100).boards
    assert any("no trivial row of shape features, so" in line for line in board.missing)


def test_what_is_missing_is_said_below_the_title_and_unknown_time_is_a_dash(tmp_path):
    from ssl3d_benchmarks.leaderboard.report.columns import shown_columns
    from ssl3d_benchmarks.leaderboard.report.text import about

    old = record("runs/old-0")
    old.contestant["pretraining"]["compute"] = {"flops_per_step": 10**9}
    rows = [row for row in [*usual(), old] if not row.contestant["name"].startswith("imagenet:")]
    (board,) = read_report([write(tmp_path, rows)], resamples=100).boards
    assert "There is no ImageNet conversion to compare with." in about(board)
    found = arms(read_report([tmp_path], resamples=100))
    time, memory = (c for c in shown_columns() if c.key in ("seconds", "peak_memory_bytes"))
    assert time.cell(board, found["old"]) == memory.cell(board, found["old"]) == "–"
    assert time.cell(board, found["alpha"]) == "60 s"
    assert any("unknown (–) for 1 of 4 encoders" in note for note in board.notes)


def test_the_table_that_a_probe_prints_says_what_the_leaderboard_says(tmp_path):
    """One pretraining may be as lucky as an untrained seed: .04 over five of ± .04 is no finding."""
    from ssl3d_benchmarks.linear_probe.config import LinearProbeConfig
    from ssl3d_benchmarks.linear_probe.protocol import LinearProbe
    from ssl3d_benchmarks.linear_probe.table import format_table
    from ssl3d_benchmarks.table import Row

    luck = (-0.05, -0.03, 0.0, 0.03, 0.05)
    results = [record("runs/alpha-0", gain=0.04)] + [
        record(f"scratch:resnet18, seed {k}", "untrained", weights_seed=k, gain=luck[k]) for k in range(5)
    ]
    for one in results:
        one.intervals["dice"] = (0.5, 0.7)
    rows = [Row(one.contestant["kind"], one.contestant["group"], one) for one in results]
    probe = LinearProbe(LinearProbeConfig(target="masks", classes=CLASSES))
    shown = format_table(rows, probe, "house split")
    cells = next(line for line in shown.splitlines() if line.startswith("runs/alpha-0")).replace("+", "")
    value, low, high = map(float, re.findall(r"(-?\.?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]", cells)[-1])
    assert value == pytest.approx(0.04, abs=0.01) and low < 0 < high
    assert "one pretraining is taken to vary as much as the untrained seeds do" in shown
    board = read_report([write(tmp_path, results)], ()).boards[0]
    gain = next(arm for arm in board.arms if arm.kind == "pretrained").gain
    assert (value, low, high) == pytest.approx((gain.value, gain.low, gain.high), abs=0.002)
    told = float(re.search(r"minimum detectable difference in dice: (\S+) ", shown)[1])
    assert told == pytest.approx(gain.detectable, abs=0.005)


def test_a_sixth_score_of_finetuning_is_printed_and_its_absence_too():
    from ssl3d_benchmarks.finetune.benchmark import Finetune
    from ssl3d_benchmarks.finetune.protocol import task_class
    from ssl3d_benchmarks.finetune.table import blocks_of, format_table
    from ssl3d_benchmarks.table import Row

    names = ("dice_1", "hd95", "hd95_1", "surface_dice", "surface_dice_1", "volume_error")
    results = [finetuned("runs/alpha-0"), finetuned("scratch:resnet18", "untrained")]
    for result in results:
        result.settings = {**result.settings, "task": {"classes": [0, 1]}}
        result.split = {**result.split, "val": {"subjects": 9}}
        result.compute = {"details": [{"lr": 0.01, "best_step": 7, "steps": 9}]}
        result.scores |= {name: 10.0 + k for k, name in enumerate(names)}
    del results[1].scores["volume_error"]
    rows = [Row(one.contestant["kind"], one.contestant["group"], one) for one in results]
    benchmark = Finetune(task_class("segmentation").scorer({"classes": [0, 1]}, "masks"))
    shown = format_table(blocks_of(rows, benchmark), benchmark, "house split")
    words = [line.split() for line in shown.splitlines()]
    assert all(sum(name in line for line in words) == 1 for name in names)
    assert ["runs/alpha-0", "14.000", "15.000"] in words and ["scratch:resnet18", "14.000", "-"] in words


def test_a_printed_table_pairs_the_same_subsets_alone():
    """Where jobs failed: scores on an easy subset were taken for a seed's, or paired with a hard one's."""
    from ssl3d_benchmarks.linear_probe.protocol import LinearProbe
    from ssl3d_benchmarks.table import Row, difference_of, make_line

    probe = LinearProbe(LinearProbe.Config(target="masks", classes=CLASSES))
    easy = (0.1, -0.2, 0.0)

    def line(name, *done):
        rows = [
            Row("encoder", "g", record(name, gain=easy[repeat], seed=seed, repeat=repeat, fraction=0.25))
            for seed, repeat in done
        ]
        return make_line(rows, probe)

    seeds = line("runs/a-0", (0, 0), (0, 1), (1, 1), (1, 2), (2, 0), (2, 1))
    assert seeds.subsets == [0, 1] and seeds.runs.each.shape == (2, 2)
    assert (seeds.runs.each[:, 0] - seeds.runs.each[:, 1] > 0.2).all()
    one, other = line("runs/a-0", (0, 0), (0, 2)), line("runs/b-0", (0, 0), (0, 1))
    unpaired = difference_of(one, other).error
    assert unpaired > 1.5 * difference_of(other, line("runs/a-0", (0, 0), (0, 1))).error
    assert unpaired == pytest.approx(statistics.paired_difference(one.runs, other.runs, False).error)


def test_one_seed_at_two_learning_rates_is_two_contestants(tmp_path):
    """The name of its file decided which of them stood for the seed, for every seed anew."""
    settings = {"target": "masks", "classes": list(CLASSES), "fractions": "all"}
    for dataset in ("set", "other"):
        rows = []
        for rate, gain in ((0.1, 0.0), (0.01, 0.15)):
            given = {"settings": {**settings, "rates": [rate]}, "dataset": dataset}
            rows += [
                record(f"scratch:resnet18, seed {k}", "untrained", weights_seed=k, gain=gain, **given)
                for k in range(5)
            ]
            rows.append(record("runs/alpha-0", gain=0.1 - gain, **given))
        write(tmp_path, rows)
    report = read_report([tmp_path], resamples=100)
    for board in report.boards:
        values = {arm.label: arm.interval.value for arm in board.arms}
        assert sorted(values) == [
            f"{name}, learning rate {rate}" for name in ("alpha", "untrained") for rate in ("0.01", "0.1")
        ]
        assert values["untrained, learning rate 0.01"] - values["untrained, learning rate 0.1"] > 0.1
        gains = [arm.gain.value for arm in board.of_kind("pretrained")]
        assert max(gains) < 0  # over the better of the two from scratch
    (overall,) = report.overall
    assert len(set(overall.methods)) == 4 and not overall.left_out


def classified(name, kind="encoder", wrong=4, people=20, **changes):
    """A record of two classes; the first subjects are told apart wrongly."""
    rows = [
        {"dataset": "set", "subject": f"s{k}", "id": f"v{k}", "target": str(int(k >= people // 2)),
         "probability": [float(right), float(not right)]}
        for k in range(people)
        for right in [(k < people // 2) != (k % 5 == 0 and k // 5 < wrong)]
    ]  # fmt: skip
    result = record(name, kind, task="linear-probe/classes", main="auc", predictions=rows, **changes)
    result.settings = {"target": "classes", "classes": list(CLASSES), "fractions": "all"}
    _, functions = _functions(result)
    ones = np.ones((1, people))
    result.scores = {key: float(of(ones)[0]) for key, of in functions.items()}
    return result


def _functions(result):
    from ssl3d_benchmarks.leaderboard.report.records import score_functions

    return score_functions(result, result.predictions)


def few_seeds(rows):
    return [row for row in rows if row.contestant["weights_seed"] in (None, 0)]


@pytest.mark.parametrize(("people", "given"), [(8, False), (20, True)])
def test_no_interval_where_a_class_has_too_few_test_subjects(tmp_path, people, given):
    rows = [classified("runs/alpha-0", wrong=1, people=people)] + [
        classified(f"scratch:resnet18, seed {k}", "untrained", weights_seed=k, people=people)
        for k in range(5)
    ]
    out = tmp_path / "out"
    made = read_report([write(tmp_path / "r", rows)], resamples=200)
    (board,) = made.boards
    alpha = arms(made)["alpha"]
    for number in (alpha.interval.low, alpha.gain.low, alpha.gain.p):
        assert np.isfinite(number) == given
    assert (alpha.rank_interval is not None) == given == (alpha.p_holm is not None)
    said = [note for note in board.notes if note.startswith("No interval is given, because class")]
    assert bool(said) != given
    main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "200"])
    written = "".join((out / name).read_text(encoding="utf-8") for name in FILES)
    assert not re.search(r"\bnan\b|[+-]nan", written)
    assert ("nothing can be said on set" in written) != given


def test_scores_at_their_bound_have_no_interval_and_no_gain(tmp_path):
    rows = [classified("runs/alpha-0", wrong=0, people=20)] + [
        classified(f"scratch:resnet18, seed {k}", "untrained", wrong=0, weights_seed=k, people=20)
        for k in range(3)
    ]
    out = tmp_path / "out"
    made = read_report([write(tmp_path / "r", rows)], resamples=200)
    alpha = arms(made)["alpha"]
    assert alpha.interval.value == 1 and np.isnan(alpha.interval.low) and np.isnan(alpha.gain.low)
    assert sum(note.startswith("No interval is given of 1.000") for note in made.boards[0].notes) == 1
    main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "200"])
    written = "".join((out / name).read_text(encoding="utf-8") for name in FILES)
    assert not re.search(r"\bnan\b|[+-]nan", written) and "both scores are at their bound" in written


def test_one_untrained_seed_gives_a_gain_without_interval(tmp_path):
    (board,) = read_report([write(tmp_path, few_seeds(usual()))], resamples=200).boards
    alpha = next(arm for arm in board.arms if arm.label == "alpha")
    assert alpha.gain.value > 0.05 and np.isnan(alpha.gain.low) and alpha.p_holm is None
    assert any("Gains over one seed have no interval" in line for line in board.missing)
    beta = next(arm for arm in board.arms if arm.label == "beta")  # two seeds tell how seeds vary
    assert np.isfinite(beta.gain.low) and beta.gain.borrowed


def test_rows_from_the_true_masks_are_named_in_the_answer_too(tmp_path):
    volumes = record("volume only", "trivial", gain=0.3)
    volumes.contestant["mask_classes"] = [1]
    found = read_report([write(tmp_path, [*usual(), volumes])], resamples=100)
    said = "; ".join(answer(found.boards))
    assert re.search(r"volume only 0\.\d+, computed from the true masks, best network", said)
    from ssl3d_benchmarks.leaderboard.report.columns import notes_of

    row = arms(found)["volume only"]
    assert "computed from the true masks" in notes_of(found.boards[0], row)


def test_time_is_the_mean_of_all_seeds(tmp_path):
    from ssl3d_benchmarks.leaderboard.report.columns import memory_of, seconds_of

    rows = usual()
    for row, seconds in zip([r for r in rows if "beta" in r.contestant["name"]], (100, 300), strict=True):
        row.contestant["pretraining"]["compute"] |= {"seconds": seconds, "peak_memory": seconds}
    # A table of few labels has several records of an encoder, one for each subset: it was pretrained once.
    few = [dataclasses.replace(row, fraction=0.1, repeat=repeat) for row in rows for repeat in range(3)]
    boards = read_report([write(tmp_path, rows + few)], resamples=100).boards
    assert len(boards) == 2
    for board in boards:
        beta = next(arm for arm in board.arms if arm.label == "beta")
        assert (seconds_of(beta), memory_of(beta)) == (200, 300)


def test_scores_that_records_are_too_old_to_have_are_named(tmp_path):
    rows = usual()
    for row in rows:
        del row.scores["dice_1"]
    (board,) = read_report([write(tmp_path, rows)], resamples=100).boards
    assert "These records are too old to have dice_1." in board.notes
    (board,) = read_report([write(tmp_path / "new", usual())], resamples=100).boards
    assert not any("too old to have" in note for note in board.notes)


def test_ranks_and_a_gain_that_disagree_say_what_each_resamples(tmp_path):
    luck = (0.0, 0.02)
    rows = [record(f"runs/alpha-{k}", gain=0.06 + luck[k]) for k in range(2)]
    rows += [
        record(f"scratch:resnet18, seed {k}", "untrained", weights_seed=k, gain=-luck[k]) for k in range(2)
    ]
    (board,) = read_report([write(tmp_path, rows)], resamples=400).boards
    alpha = next(arm for arm in board.arms if arm.label == "alpha")
    assert alpha.rank_interval == (1, 1) and alpha.gain.low < 0 < alpha.gain.high
    assert any(
        "do not overlap, yet the gain may be zero. A range of ranks resamples" in x for x in board.notes
    )


ODD = (
    None,
    True,
    -1,
    0.5,
    1e308,
    10**400,
    "x",
    "",
    "\ud800",
    [],
    [1],
    [[]],
    {},
    {"x": 1},
    {"x": {"y": []}},
)
"""Values that belong nowhere in a record."""


def places(value, way=()):
    """The way to every part of a record, but for all predictions after the first."""
    yield way
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    ):
        yield from places(inner, (*way, key))


def check_odd_records(folder, number, seed):
    """Each odd record is refused by name or read, and never ends the report of the others."""
    from ssl3d_benchmarks.leaderboard.report.page import page
    from ssl3d_benchmarks.leaderboard.report.text import csv_text, markdown_text

    rng = np.random.default_rng(seed)
    for row in usual():
        write_result(row, folder)
    path = next(iter(sorted(folder.glob("*alpha*"))))
    whole = path.read_text(encoding="utf-8")
    ways = sorted((way for way in places(json.loads(whole)) if way), key=str)
    for _ in range(number):
        way, odd = ways[rng.integers(len(ways))], ODD[rng.integers(len(ODD))]
        content = json.loads(whole)
        part = content
        for key in way[:-1]:
            part = part[key]
        part[way[-1]] = odd
        path.write_text(json.dumps(content), encoding="utf-8")
        where = f"{'.'.join(map(str, way))} = {odd!r:.40}"
        try:
            found = read_report([folder], (), 100)
            texts = [
                page("t", found.boards, found.overall, found.records.refused, [], False),
                markdown_text("t", found.boards, found.overall, found.records.refused, []),
                csv_text(found.boards),
            ]
            for text in texts:
                text.encode()
        except Exception as error:
            raise AssertionError(where) from error
        names = {arm.label for board in found.boards for arm in board.arms}
        assert {"beta", "gamma"} <= names, where
        assert (
            "alpha" in " ".join(names) or found.records.refused or len(way) == 1 or way[0] == "contestant"
        ), where


def test_odd_records_are_refused_by_name_or_read(tmp_path):
    check_odd_records(tmp_path, 50, 0)


@pytest.mark.slow
def test_a_thousand_odd_records_are_refused_by_name_or_read(tmp_path):
    check_odd_records(tmp_path, 1000, 1)


def test_names_are_no_html_no_formulas_and_no_escape_codes(tmp_path, capsys):
    bad = "=1+1|<script>alert(1)</script>[x](javascript:y)\x1b[31m\u202e"
    rows = usual(dataset="<script>alert(2)</script>\x1b[31m")
    for row in rows:
        row.contestant["name"] = f"{bad}{row.contestant['name']}"
    write(tmp_path / "r", rows)
    (tmp_path / "r" / "\x1b[2J.json").write_text('{"task": 1}', encoding="utf-8")
    out = tmp_path / "out"
    main(["leaderboard", "report", str(tmp_path / "r"), "--out", str(out), "--resamples", "100"])
    shown = capsys.readouterr()
    page, markdown, table = ((out / name).read_text(encoding="utf-8") for name in FILES)
    for text in (page, markdown, table, shown.out, shown.err):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "<script>alert" not in page + markdown and "](javascript" not in markdown
    cells = [cell for row in csv.reader(table.splitlines()) for cell in row]
    assert any(cell.startswith("'=1+1") for cell in cells)
    assert not any(re.match(r"[=+@\t\r]|-(?!\d)", cell) for cell in cells)


def test_the_first_screen_is_two_sentences_a_matrix_and_gains(made, report):
    from ssl3d_benchmarks.leaderboard.report.overview import in_short

    said = in_short(report.boards)
    assert len(said) == 2
    assert said[0].startswith("Frozen, a pretrained encoder is significantly better than the same network")
    assert "on 1 of 1 table and significantly worse on 1" in said[0] and "alpha +0.09" in said[0]
    assert said[1].startswith("The smallest gain that could have been shown is 0.0")
    (board,) = report.boards
    for others, words in (
        ((0.0301, 0.0304), "The smallest gain that could have been shown is 0.030."),
        ((9.5, 10.25), "The smallest gains that the tables could have shown are 9.500 to 10.250."),
    ):
        assert in_short([dataclasses.replace(board, detectable=least) for least in others])[1] == words
    text = (made / "index.html").read_text(encoding="utf-8")
    before = text.partition("<h2>Tables</h2>")[0]
    assert all(x in before for x in said) and before.index(said[0]) < before.index('class="wide matrix"')
    assert before.index('class="wide matrix"') < before.index("Gains with 95 % intervals")


def cells_of(boards):
    """The cells of the matrix by the name of their row: class and words."""
    from ssl3d_benchmarks.leaderboard.report.overview import matrix

    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', matrix(boards))
    return {
        html.unescape(re.sub("<.*", "", name)): [
            (look, html.unescape(re.sub("<[^>]*>", "", words)))
            for look, words in re.findall(r'<td(?: class="(\w+)")?[^>]*>(.*?)</td>', cells)
        ]
        for name, cells in rows
    }


def test_the_matrix_has_every_gain_its_colour_and_its_mark(report):
    found = arms(report)
    cells = cells_of(report.boards)
    for label in ("alpha", "beta", "gamma", "leak"):
        (name,) = [row for row in cells if row.startswith(label)]
        ((look, words),) = cells[name]
        gain = found[label].gain.value
        assert words.startswith(f"{gain:+.3f}".replace("0.", ".").replace("-", "\u2212"))
        if label == "leak":  # it saw test subjects: nothing can be told
            assert look == "untold" and "\u25cf" not in words
            continue
        assert look.startswith("up" if gain > 0 else "down")
        assert ("\u25cf" in words) == (found[label].p_holm < 0.05)
    (alpha,), (gamma,) = cells["alpha, own data"], cells["gamma, own data"]
    assert alpha[0] == "up3" and gamma[0] == "down2"


def test_a_gain_too_small_to_matter_has_no_colour_but_its_digits(tmp_path):
    same = [one for one in usual() if one.contestant["name"] != "runs/gamma-0"]
    (board,) = read_report(
        [write(tmp_path, [*same, record("runs/gamma-0", gain=0.0)])], resamples=100
    ).boards
    ((look, words),) = cells_of([board])["gamma, own data"]
    (gain,) = (arm.gain.value for arm in board.arms if arm.title.startswith("gamma"))
    assert 0 < abs(gain) < 0.005 and look == "even"
    assert words == f"{gain:+.3f}".replace("0.", ".").replace("-", "\u2212")


def test_the_best_network_of_a_table_does_not_hide_a_better_row_without_one(tmp_path):
    from ssl3d_benchmarks.leaderboard.report.page import page

    rows = [one for one in usual() if one.contestant["kind"] != "trivial"]
    for name, gain, words in (
        ("low", -0.2, "best network: alpha"),
        ("high", 0.19, "no network is above high 0."),
    ):
        easy = record(name, "trivial", gain=gain)
        report = read_report([write(tmp_path / name, [*rows, easy])], resamples=100)
        (said,) = re.findall(r"<small>(\d+ contestants; [^<]*)", page("t", report.boards, [], [], []))
        assert said.startswith(f"6 contestants; {words}")


def test_of_several_encoders_of_one_name_none_stands_for_all(tmp_path):
    """The best of them would have stood for the method."""
    rows = usual()
    other = record("runs/alpha-0", gain=-0.1)
    other.contestant |= {"name": "other/alpha_slow-0", "digest": "other"}
    (board,) = read_report([write(tmp_path, [*rows, other])], resamples=100).boards
    names = [name for name in cells_of([board]) if name.startswith("alpha")]
    assert len(names) == 2 and len({tuple(cells_of([board])[name]) for name in names}) == 2


def test_what_did_not_learn_tells_nothing(report):
    from ssl3d_benchmarks.leaderboard.report.answer import why_untold
    from ssl3d_benchmarks.leaderboard.report.overview import in_short

    board, alpha = report.boards[0], arms(report)["alpha"]
    assert not why_untold(board, alpha)
    board.unlearned.append("alpha ended at dice 0.1, no better than")
    try:
        assert why_untold(board, alpha) == "a network is not shown to have learned its task"
        scratch = next(arm for arm in board.arms if arm.kind == "scratch").title
        board.unlearned.append(f"{scratch} ended at dice 0.1, no better than")
        said = in_short([board])[0]
        assert "nothing can be told" in said and "a network is not shown to have learned" in said
    finally:
        board.unlearned.clear()


@pytest.mark.parametrize(
    ("kind", "label", "group", "title"),
    [
        ("pretrained", "simclr, own data", "", "SimCLR, hippocampus MR"),
        ("pretrained", "simclr, on hippocampus", "", "SimCLR, hippocampus MR"),
        (
            "pretrained",
            "simclr, own data, resnet18",
            "scratch:resnet18",
            "SimCLR, hippocampus MR, ResNet-18 ACS",
        ),
        ("pretrained", "mae + sorting", "", "MAE + Slice sorting"),
        ("pretrained", "my_proxy", "", "my_proxy"),
        ("pretrained", "swav after ImageNet", "", "SwAV after ImageNet"),
        (
            "pretrained",
            "swav, resnet18:width=32",
            "scratch:resnet18:width=32",
            "SwAV, ResNet-18 ACS width 32",
        ),
        ("imagenet", "ImageNet mobilenet_v2:i3d:strides=[1,1,1]", "", "ImageNet MobileNetV2 I3D"),
    ],
)
def test_names_are_those_that_people_use(kind, label, group, title):
    from types import SimpleNamespace

    from ssl3d_benchmarks.leaderboard.report.names import titled

    who = {"group": group, "architecture": {"name": "resnet18", "config": {"kind": "acs"}}}
    result = SimpleNamespace(contestant=who)
    data = {"datasets": ["hippocampus"], "modalities": {"hippocampus": "MR"}}
    first = SimpleNamespace(result=result, pretraining={"data": data})
    arm = SimpleNamespace(label=label, kind=kind, first=first)
    assert titled(arm) == title
    first.pretraining = {"data": {"datasets": ["hippocampus"]}}  # as records of before have it
    assert titled(arm) == title.replace("hippocampus MR", label.split(", ")[-1 - ("resnet" in label)])
    if kind == "imagenet":  # where two have the same name
        assert titled(arm, True) == "ImageNet MobileNetV2 I3D strides 1"


def test_the_methods_paragraph_says_what_was_done(report, made):
    from ssl3d_benchmarks.leaderboard.report.methods import methods_paragraph

    words = methods_paragraph(report.boards, 400)
    assert "on set (60 training and 30 test subjects)" in words and "400 resamples" in words
    assert "ResNet-18" in words or "resnet18" in words
    assert "the nearest" not in words and "a linear model on the features" in words
    assert "Methods, to paste into a paper" in (made / "index.html").read_text(encoding="utf-8")


def test_full_settings_are_one_click_away(made):
    text = (made / "index.html").read_text(encoding="utf-8")
    row = re.search(r'data-v="beta"><details><summary>beta</summary><small>(.*?)</small>', text)[1]
    assert "recorded as runs/beta-0; runs/beta-1" in row and "100 steps, 50 volumes of set" in row


def printed(results):
    """The table that the dense probe prints of some records."""
    from ssl3d_benchmarks.linear_probe.protocol import LinearProbe
    from ssl3d_benchmarks.linear_probe.table import format_table
    from ssl3d_benchmarks.table import Row

    rows = [Row(one.contestant["kind"], one.contestant["group"], one) for one in results]
    return format_table(
        rows, LinearProbe(LinearProbe.Config(target="masks", classes=CLASSES)), "house split"
    )


@pytest.mark.parametrize(("seeds", "given"), [(1, False), (3, True)])
def test_a_probe_prints_no_interval_over_one_untrained_seed(seeds, given):
    results = [record("runs/alpha-0", gain=0.04)] + [
        record(f"scratch:resnet18, seed {k}", "untrained", weights_seed=k) for k in range(seeds)
    ]
    text = printed(results)
    row = next(line for line in text.splitlines() if line.startswith("runs/alpha-0"))
    assert bool(re.search(r"\+0\.0\d+ \[[+-]0\.\d+, [+-]0\.\d+\]", row)) == given
    assert re.search(r"\+0\.0\d+", row)
    assert ("No interval of the difference is given, because one untrained seed" in text) != given
    assert ("--untrained 5 does." in text) != given


def test_printed_tables_say_which_rows_read_the_true_masks():
    from ssl3d_benchmarks.finetune.benchmark import Finetune
    from ssl3d_benchmarks.finetune.protocol import task_class
    from ssl3d_benchmarks.finetune.table import blocks_of, format_table
    from ssl3d_benchmarks.table import Row

    volumes = record("volume only", "trivial", gain=-0.3)
    volumes.contestant["mask_classes"] = [1]
    text = printed([record("runs/alpha-0"), volumes])
    assert re.search(r"volume only .*  computed from the true masks$", text, re.MULTILINE)

    rows = [finetuned("volume only", "trivial", gain=-0.3), finetuned("scratch:resnet18", "untrained")]
    rows[0].contestant["mask_classes"] = [1]
    for row in rows:
        row.settings = {**row.settings, "task": {"classes": [0, 1]}}
        row.split = {**row.split, "val": {"subjects": 9}}
        trained = row.contestant["kind"] != "trivial"
        row.compute = {"details": [{"lr": 0.01, "best_step": 7, "steps": 9}]} if trained else {}
    benchmark = Finetune(task_class("segmentation").scorer({"classes": [0, 1]}, "masks"))
    both = [Row(one.contestant["kind"], one.contestant["group"], one) for one in rows]
    shown = format_table(blocks_of(both, benchmark), benchmark, "house split")
    assert "no network; computed from the true masks" in shown


@pytest.mark.parametrize("curve", [[{"step": "many", "score": 0.1}], [1], 7])
def test_an_odd_curve_refuses_its_record_alone(tmp_path, curve):
    rows = usual()
    rows[0].compute = {"details": {"curve": curve}}
    found = read_report([write(tmp_path, rows)], resamples=100)
    (refused,) = found.records.refused
    assert (refused.who, "curve cannot be read: " in refused.why) == ("runs/alpha-0", True)
    assert "beta" in arms(found)


def test_a_table_of_an_older_version_says_so_beside_a_newer_one():
    from ssl3d_benchmarks.leaderboard.report.records import Table, _say_what_differs

    tables = [Table("seg", version, ("people",), {"width": version}, "dice", []) for version in (102, 106)]
    _say_what_differs(tables)
    assert tables[0].differs == "an older version of the task (102; the newest has 106), width 102"
    assert tables[1].differs == "width 106"
