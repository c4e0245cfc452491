"""The parts of training: rates, optimizers, precision, the choice of subjects, means over parts."""

import math
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssl3d.encoders.inference import evaluating
from ssl3d.errors import UsageError
from ssl3d.training import device
from ssl3d.training.batch import Group, cut
from ssl3d.training.online import knn_accuracy, spread_of
from ssl3d.training.optim import build_optimizer, lr_at, without_decay
from ssl3d.training.options import PretrainOptions
from ssl3d.training.selection import select
from ssl3d.training.trainee import Reducer


def test_the_rate_rises_then_falls_as_a_cosine():
    rates = [lr_at(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert all(np.diff(rates[9:]) <= 0) and 0 < rates[-1] < 0.01
    assert lr_at(0, 1, 1.0, 0.0) == 1.0


def test_weight_decay_spares_norms_and_biases():
    module = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Linear(2, 2))
    spared = without_decay(module)
    assert spared == {"0.bias", "1.weight", "1.bias", "2.bias"}
    groups = build_optimizer(
        module.named_parameters(), spared, PretrainOptions(weight_decay=0.3)
    ).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 2), (0.0, 4)]


@pytest.fixture
def own_environment():
    """Fabric leaves its rank and port in the environment."""
    with mock.patch.dict(os.environ):
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS"):
            os.environ.pop(name, None)
        yield


def test_weight_decay_spares_norms_and_biases_under_ddp(own_environment):
    from torch import distributed

    options = PretrainOptions(weight_decay=0.3, device="cpu", strategy="ddp", devices=1)
    fabric = device.make_fabric(options, "32")
    fabric.launch()
    try:
        module = nn.ModuleDict({"encoder": nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2))})
        spared = without_decay(module)
        wrapped = fabric.setup_module(module)
        groups = build_optimizer(wrapped.named_parameters(), spared, options).param_groups
    finally:
        distributed.destroy_process_group()
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 1), (0.0, 3)]


def test_lars_scales_kernels_and_not_biases():
    module = nn.Linear(4, 4)
    options = PretrainOptions(optimizer="lars", lr=1.0, weight_decay=1e-6, momentum=0.0)
    optimizer = build_optimizer(module.named_parameters(), without_decay(module), options)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    module.weight.grad, module.bias.grad = torch.full((4, 4), 100.0), torch.full((4,), 0.5)
    optimizer.step()
    # The trust ratio makes the step 1/1000 of the weights' norm, whatever the gradient's.
    assert (module.weight - weight).norm().item() == pytest.approx(1e-3 * weight.norm().item(), rel=1e-2)
    assert torch.allclose(module.bias, bias - 0.5)


@pytest.mark.parametrize(
    ("flags", "gain", "expected"),
    [
        ("flags : fpu sse avx512f avx512_bf16", 0.1, "bf16"),
        ("flags : fpu amx_bf16 amx_tile", 0.1, "bf16"),
        ("flags : fpu sse avx2", 9.0, "32"),
        ("Features : asimd", 9.0, "bf16"),
        ("Features : asimd", 1.0, "32"),
        (None, 9.0, "bf16"),
    ],
)
def test_auto_precision_follows_the_cpu(tmp_path, monkeypatch, flags, gain, expected):
    monkeypatch.setattr(device, "accelerator_of", lambda options: "cpu")
    monkeypatch.setattr(device, "_bf16_gain", lambda: gain)
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(flags + "\n", encoding="utf-8")
    assert device.resolve_precision(PretrainOptions(), cpuinfo) == expected
    assert device.resolve_precision(PretrainOptions(precision="32"), cpuinfo) == "32"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "32")])
def test_auto_precision_follows_the_gpu(monkeypatch, supported, expected):
    monkeypatch.setattr(device, "accelerator_of", lambda options: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert device.resolve_precision(PretrainOptions()) == expected


def test_the_launcher_says_how_many_ranks(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert device.ranks(PretrainOptions(), "cpu") == (1, 1)
    assert device.ranks(PretrainOptions(devices=3, nodes=2), "cpu") == (3, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert device.ranks(PretrainOptions(), "cpu") == (2, 4)
    with pytest.raises(UsageError, match="--devices 3: the launcher started 2"):
        device.ranks(PretrainOptions(devices=3), "cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert device.ranks(PretrainOptions(), "cpu") == (4, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from ssl3d.data.open import open_data
    from ssl3d.data.phantoms import phantom_store

    return open_data([phantom_store(40, shape=(16, 16, 16), folder=tmp_path_factory.mktemp("p"))])


def people(part):
    return set(part.subject_codes.tolist())


def test_labelled_data_keep_their_test_subjects_out(data):
    from ssl3d.data.split import house_split

    chosen = select(data, "train", 0.1)
    split = house_split(data)
    allowed = people(data.select(split == "train"))
    assert people(chosen.train) | people(chosen.holdout) == allowed
    assert not people(chosen.train) & people(chosen.holdout)
    assert not people(chosen.queries) & people(chosen.train)
    assert not people(chosen.queries) & people(data.select(split == "test"))
    assert len(people(chosen.holdout)) == round(0.1 * len(allowed))
    assert any("train split" in line for line in chosen.notes)


def test_all_subjects_on_request_and_no_holdout(data):
    chosen = select(data, "all", 0.0)
    assert len(chosen.train) == len(data) and not len(chosen.holdout)


def test_few_subjects_keep_one_out_from_eight_on(data):
    order = np.unique(data.subject_codes)
    for count, kept in ((7, 0), (8, 1)):
        few = data.select(np.isin(data.subject_codes, order[:count]))
        assert len(people(select(few, "all", 0.01).holdout)) == kept


def small_store(path, rows):
    """A store of (dataset, subject, label, split, mask, boxes) rows."""
    from ssl3d.data.open import open_data
    from ssl3d.data.store.record import Record
    from ssl3d.data.store.writer import assemble, write_part

    image = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    parts = path.with_name(f"{path.name}.partial")
    for i, (dataset, subject, label, split, mask, boxes) in enumerate(rows):
        more = {"mask": np.ones((4, 8, 8), np.uint8)} if mask else {}
        if boxes:
            more |= {"boxes": np.zeros((0, 6), np.float32), "box_labels": np.zeros(0, np.int64)}
        entry = Record(id=str(i), dataset=dataset, subject=subject, label=label, split=split)
        write_part(parts, f"{i:04d}", entry, image, **more)
    assemble(parts, path, {}, [])
    return open_data([path])


def mixed_rows(labelled=8, unlabelled=16, dataset="mixed"):
    return [(dataset, f"s{i}", i % 2 if i < labelled else None, "", False, False)
            for i in range(labelled + unlabelled)]  # fmt: skip


def test_subjects_without_a_label_are_all_used(tmp_path):
    from ssl3d.data.split import house_split

    mixed = small_store(tmp_path / "s.h5", mixed_rows() + mixed_rows(0, 3, "plain"))
    chosen = select(mixed, "train", 0.0)
    split, known = house_split(mixed), np.array([label is not None for label in mixed.labels])
    assert people(chosen.train) == people(mixed.select(~known | (split == "train")))
    kept = int((known & (split == "train")).sum())
    assert 0 < kept < 8 and (split[~known] != "train").any()
    assert chosen.notes[:2] == [
        f"mixed (labelled in part): {kept} of the train split + 16 unlabelled, {kept + 16} of 24 volumes, "
        f"{kept + 16} subjects",
        "plain (unlabelled): all, 3 of 3 volumes, 3 subjects",
    ]
    # No test subject of a benchmark, and the queries of the kNN score are not learned from.
    assert not people(chosen.train) & people(mixed.select(known & (split != "train")))
    assert len(chosen.queries) and not people(chosen.queries) & people(chosen.train)


def test_namesakes_of_test_subjects_in_another_data_set_are_told(tmp_path):
    parts = ["test", "test", "test", "val", *["train"] * 4]
    scans = [("lab", f"p{i}", 0.5, part, False, False) for i, part in enumerate(parts)]
    others = [("unl", f"p{i}", None, "", False, False) for i in range(2, 12)]
    (line,) = select(small_store(tmp_path / "s.h5", scans + others), "train", 0.0).notes[2:]
    assert line.startswith(
        "subjects kept for validation and test have the names of subjects of another data set"
    )
    assert ": p2, p3; if" in line and "--dataset NAME" in line
    one = [("lab", *row[1:]) for row in others]
    assert len(select(small_store(tmp_path / "one.h5", scans + one), "train", 0.0).notes) == 1
    other = [("unl", f"q{i}", *row[2:]) for i, row in enumerate(others)]
    assert len(select(small_store(tmp_path / "two.h5", scans + other), "train", 0.0).notes) == 2


@pytest.mark.parametrize("mark", ["label", "mask", "boxes", "split"])
def test_one_mark_on_one_volume_makes_a_subject_labelled(tmp_path, mark):
    from ssl3d.data.split import house_split

    bare = (None, "", False, False)
    marked = {"label": (0.5, "", False, False), "mask": (None, "", True, False),
              "boxes": (None, "", False, True), "split": (None, "test", False, False)}[mark]  # fmt: skip
    rows = [
        ("d", f"s{i}", *(marked if i < 10 and scan == 1 else bare)) for i in range(20) for scan in (0, 1)
    ]
    data = small_store(tmp_path / "s.h5", rows)
    chosen = select(data, "train", 0.0)
    split, first = house_split(data), np.array([int(s[1:]) < 10 for s in data.subjects])
    away = people(data.select(first & (split != "train")))
    assert away and people(chosen.train) == people(data) - away
    assert len(chosen.train) == 2 * len(people(chosen.train))


def test_runs_of_the_earlier_rule_choose_by_data_set(tmp_path):
    from ssl3d.data.split import house_split

    data = small_store(tmp_path / "s.h5", mixed_rows() + mixed_rows(0, 3, "plain"))
    chosen = select(data, "train", 0.0, "")
    allowed = (house_split(data) == "train") | (data.datasets == "plain")
    assert people(chosen.train) == people(data.select(allowed))
    assert len(select(data, "train", 0.0).train) > len(chosen.train)
    # Then by subject, but with one split of all.
    rows = [("d", f"s{i}", None, "", i % 4 == 0, False) for i in range(40)]
    data = small_store(tmp_path / "m.h5", rows)
    free = ~data.has_mask
    for by, dealt in (("subject", False), ("subject and target", True)):
        allowed = free | (house_split(data, by_target=dealt) == "train")
        assert people(select(data, "train", 0.0, by).train) == people(data.select(allowed))


@given(rows=st.lists(st.integers(0, 3), min_size=4, max_size=12), parts=st.sampled_from([1, 2, 4]))
def test_cutting_keeps_every_row_once(rows, parts):
    # rows[i] is the group that row i is in.
    groups = []
    for number in sorted(set(rows)):
        own = tuple(i for i, group in enumerate(rows) if group == number)
        tensors = {"index": torch.tensor(own)}
        groups.append(Group("p", tensors, own, len(rows), tuple(f"v{i}" for i in own)))
    found = cut(groups, parts)
    assert len(found) == parts
    seen = [row for part in found for group in part for row in group.rows]
    assert sorted(seen) == list(range(len(rows)))
    sizes = [sum(len(group.rows) for group in part) for part in found]
    assert max(sizes) - min(sizes) <= 1
    for part in found:
        for group in part:
            assert group.tensors["index"].tolist() == list(group.rows)
            assert group.volumes == tuple(f"v{i}" for i in group.rows)


def test_every_rank_names_the_volumes_it_sets_aside(tiny_plugins, phantoms, capsys):
    from ssl3d.data.open import open_data
    from ssl3d.errors import DataError
    from ssl3d.training.build import holdout_batches, loader_of
    from ssl3d.training.monitor import Log
    from ssl3d.training.options import plan_from

    data = open_data([phantoms])
    plan = plan_from({"proxy": "tiny", "batch_size": 4, "workers": 0}, "x")
    fabric = SimpleNamespace(global_rank=1, world_size=2, device=torch.device("cpu"))
    loader = loader_of(data, plan, fabric, 0, Log(on=False))
    loader._on_set_aside("set/a", "cut short")
    assert "set aside: set/a: cut short" in capsys.readouterr().err

    class Never(plan.proxies["tiny"][0]):
        @classmethod
        def draw(cls, config, volume, rng):
            raise DataError("damaged")

    plan.proxies["tiny"] = (Never, plan.proxies["tiny"][1])
    with pytest.raises(DataError, match="no volume can be drawn"):
        holdout_batches(data, plan, fabric, Log(on=False))
    told = capsys.readouterr()
    assert "set aside: phantoms/" in told.err and not told.out


def test_means_are_weighted_by_examples():
    one = {"a": (torch.tensor(6.0), 3), "b": (torch.tensor(1.0), 1)}
    two = {"a": (torch.tensor(2.0), 1)}
    means, flag = Reducer(1, torch.device("cpu")).mean([one, two], 9)
    assert means == {"a": 2.0, "b": 1.0} and flag == 9


def test_evaluation_puts_modes_back():
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    module.train()
    module[1].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert module[0].training and not module[1].training


def test_the_collapse_measure_is_nought_when_all_is_one():
    torch.manual_seed(0)
    assert spread_of(torch.ones(64, 32)) == pytest.approx(0, abs=1e-5)
    assert spread_of(torch.randn(512, 32)) == pytest.approx(1, abs=0.05)


def test_neighbours_of_a_small_bank_vote():
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    queries = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    assert knn_accuracy(bank, ["a", "a", "b"], queries, ["a", "b"]) == 1.0
    assert knn_accuracy(bank, ["a", "a", "b"], queries, ["b", "a"]) == 0.0


def test_recorded_numbers_are_json_even_if_not_finite(tmp_path):
    from ssl3d.training.monitor import _plain

    assert _plain(math.nan) is None and _plain(1 / 3) == 0.3333333 and _plain("x") == "x"


def test_the_loss_of_groups_is_that_of_the_whole_batch(tiny_plugins):
    """Two groups of different sizes weigh by their examples."""
    from ssl3d.proxy import Proxy, StepOutput
    from ssl3d.specs import encoder_from
    from ssl3d.training.trainee import Trainee

    class Mean(Proxy):
        main, paper, Config = "x", "", SimpleNamespace

        @classmethod
        def draw(cls, config, volume, rng):
            return {}

        def forward(self, batch, rng):
            return StepOutput(batch["x"].mean() + 0 * rng.uniform().sum(), {"x": batch["x"].mean()})

    encoder = encoder_from("scratch:resnet10:width=4")
    trainee = Trainee(encoder, {"mean": Mean(None, encoder)}, {"mean": 2.0}, seed=0)

    def group(values, rows):
        tensors = {"x": torch.tensor(values), "index": torch.tensor(rows)}
        return Group("mean", tensors, tuple(rows), 3, tuple(map(str, rows)))

    loss, sums = trainee("loss", [group([1.0, 2.0], [0, 2]), group([6.0], [1])], 0)
    assert loss.item() == pytest.approx(2 * 3.0)
    assert Reducer(1, torch.device("cpu")).mean([sums.values])[0] == {
        "loss": pytest.approx(6.0), "mean/loss": pytest.approx(3.0), "mean/x": pytest.approx(3.0),
    }  # fmt: skip
