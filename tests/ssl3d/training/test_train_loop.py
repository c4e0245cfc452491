"""A run from start to end: what is trained, recorded, exported, and refused."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssl3d
from ssl3d.errors import PluginError, TrainingError, UsageError
from ssl3d.proxy import StepOutput
from ssl3d.training.options import STEPS, plan_from, request_of
from ssl3d.training.trainee import Trainee


def weights(run, name="encoder"):
    return (run.folder / name / "encoder.safetensors").read_bytes()


def state(run):
    return run.encoder.state_dict()


def close(a, b, tolerance=1e-5):
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-4, atol=tolerance) for k in a)


def test_a_run_leaves_everything_that_the_plan_lists(train, capsys):
    run = train(steps=6, save_at=[0, 0.5, 1], eval_every=3, checkpoint_every=2)
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "train.log", "checkpoints", "encoder"} <= names
    assert {"encoder-at-00", "encoder-at-50", "encoder-at-100"} <= names
    assert run.finished
    assert weights(run) == weights(run, "encoder-at-100") != weights(run, "encoder-at-50")
    assert len(list((run.folder / "checkpoints").iterdir())) == 2
    records = run.metrics
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "grad_norm", "seconds", "waiting", "tiny/loss", "tiny/error"} <= set(records[0])
    assert "holdout/tiny/error" in records[2] and "online/embedding_std" in records[2]
    assert "online/knn_accuracy" in records[5]
    told = capsys.readouterr().out
    assert f"ssl3d linear-probe {run.folder}" in told
    assert told.index("expected: about") < told.index("step 1/6")
    assert "kept out" in told and "train split" in told
    assert (run.folder / "train.log").read_text(encoding="utf-8").count("expected: about") == 1
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("run/loss")] == [1, 2, 3, 4, 5, 6]
    assert {"run/volumes_per_s", "run/waiting", "online/embedding_std"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["tiny/picture"]
    assert sorted(p.name for p in (run.folder / "pictures").iterdir()) == [
        "tiny-00000003.png",
        "tiny-00000006.png",
    ]


def test_the_encoder_tells_where_it_comes_from(train):
    run = train()
    card = run.encoder.metadata
    assert card["patch"] == [12, 12, 12] and card["steps"] == 4 and card["labels_seen"] is False
    assert card["proxies"]["tiny"]["size"] == 12
    assert card["citations"]["tiny"] == "Nobody: Nothing, 2020"
    assert len(card["data"]["digest"]) >= 16 and card["versions"]["torch"]
    assert card["identities"] and all(len(one) == 16 for one in card["identities"])
    assert "phantom" not in json.dumps(card["identities"])


def test_the_loss_falls(train):
    run = train(steps=40, lr=0.01, eval_every=-1)
    losses = [record["loss"] for record in run.metrics]
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:4])


def test_the_number_of_workers_changes_nothing(train):
    assert weights(train("a", workers=0)) == weights(train("b", workers=2))


def test_the_seed_changes_weights_and_order(train):
    assert weights(train("a", seed=0)) != weights(train("b", seed=1))


def test_accumulation_is_the_whole_batch_in_parts(train):
    whole, parts = train("a", batch_size=8), train("b", batch_size=8, accumulate=4)
    assert close(state(whole), state(parts))
    a, b = whole.metrics, parts.metrics
    assert np.allclose([r["loss"] for r in a], [r["loss"] for r in b], rtol=1e-4)
    assert np.allclose([r["grad_norm"] for r in a], [r["grad_norm"] for r in b], rtol=1e-3)


def test_several_proxies_are_weighted_and_logged_by_name(train):
    run = train(proxy=["tiny", "other"], weights=[1.0, 0.25], other={"noise": 0.0})
    for record in run.metrics:
        assert record["loss"] == pytest.approx(record["tiny/loss"] + 0.25 * record["other/loss"], rel=1e-4)
    assert set(ssl3d.load_proxies(run.folder)) == {"tiny", "other"}


def test_a_weight_of_nought_trains_nothing(train):
    off = train("a", proxy=["tiny", "other"], weights=[1.0, 0.0], weight_decay=0.01)
    alone = train("b", weight_decay=0.01)
    # The heads are drawn one after the other, so the first proxy's are the same in both runs.
    assert close(state(off), state(alone), 1e-6)


def test_trained_heads_are_loaded_with_the_proxies(train):
    run = train(steps=8)
    proxy = ssl3d.load_proxies(run.folder)["tiny"]
    assert int(proxy.done) == 8 and not proxy.training
    assert proxy.average.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(proxy.encoder.parameters(), run.encoder.parameters()))


def test_a_loss_that_is_not_finite_names_the_volumes(train, tmp_path):
    with pytest.raises(TrainingError, match=r"step 3.*tiny is not finite.*phantom.*phantom"):
        train(tiny={"nan_at": 2}, checkpoint_every=1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert [p.name.split("-")[1] for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "00000001",
        "00000002",
    ]


def test_a_gradient_that_is_not_finite_is_never_saved(phantoms, small, tmp_path, tiny_plugins):
    from tiny_ssl3d_plugins import Tiny

    class Steep(Tiny):
        """Its loss stays finite, its gradient is 0 times infinity from the third step on."""

        def forward(self, batch, rng):
            output = super().forward(batch, rng)
            steep = (self.head.weight * float(int(self.done) < 2)).abs().sum().sqrt()
            return output._replace(loss=output.loss + 1e-3 * steep)

    with pytest.raises(TrainingError, match=r"step 3: a gradient is not finite.*phantom.*phantom"):
        ssl3d.pretrain(
            Steep, data=phantoms, out=tmp_path / "run", **small, steps=4, checkpoint_every=1, eval_every=-1
        )
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name.split("-")[1] for path in saved] == ["00000001", "00000002"]


def taught(exports):
    """The proxy `tiny` with a momentum teacher, and what it exports."""
    from tiny_ssl3d_plugins import Tiny

    class Taught(Tiny):
        """A teacher halves its distance to the encoder at every step."""

        def __init__(self, config, encoder):
            super().__init__(config, encoder)
            self.teacher = copy.deepcopy(encoder).requires_grad_(False)

        @torch.no_grad()
        def after_step(self, step, total):
            super().after_step(step, total)
            for mine, theirs in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)

    Taught.exports = exports
    return Taught


def test_a_teacher_is_exported_beside_the_encoder(phantoms, small, tmp_path, tiny_plugins, capsys):
    kind = taught(lambda self: {"teacher": self.teacher})
    out = tmp_path / "run"
    ssl3d.pretrain(kind, data=phantoms, out=out, steps=2, save_at=(0, 0.5), **small)
    assert f"; teacher in {out / 'teacher'}" in capsys.readouterr().out

    def weights(folder):
        return ssl3d.load_encoder(out / folder).state_dict()

    begun, once, twice = (weights(f) for f in ("encoder-at-00", "encoder-at-50", "encoder"))
    for name, value in weights("teacher").items():
        expected = begun[name] / 4 + once[name] / 4 + twice[name] / 2
        torch.testing.assert_close(value, expected)
    assert any(not torch.equal(value, twice[name]) for name, value in weights("teacher").items())
    torch.testing.assert_close(weights("teacher-at-00"), begun)
    cards = [json.loads((out / f / "encoder.json").read_text("utf-8")) for f in ("teacher", "encoder")]
    assert cards[0]["exported"] == "teacher" and "exported" not in cards[1]
    assert cards[0]["identities"] == cards[1]["identities"] and cards[0]["steps"] == 2


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        (lambda self: {"heads": self.teacher}, "cannot be the name of a folder beside the encoder"),
        (lambda self: {"../teacher": self.teacher}, "cannot be the name of a folder"),
        (lambda self: {"teacher": self.head}, "is no copy of the encoder"),
        (lambda self: {"teacher": self.encoder}, "is no module of the proxy's own"),
        (lambda self: {"teacher": copy.deepcopy(self.encoder)}, "is no module of the proxy's own"),
    ],
)
def test_what_cannot_be_exported_is_said_before_training(
    exports, message, phantoms, small, tmp_path, tiny_plugins
):
    with pytest.raises(PluginError, match=message):
        ssl3d.pretrain(taught(exports), data=phantoms, out=tmp_path / "run", steps=2, **small)


def changed(forward, start=None):
    """The proxy `tiny`, with another `forward` and more in its `__init__`."""
    from tiny_ssl3d_plugins import Tiny

    def make(self, config, encoder):
        Tiny.__init__(self, config, encoder)
        if start is not None:
            start(self)

    return type("Changed", (Tiny,), {"__init__": make, "forward": forward, "__module__": __name__})


def test_a_layer_made_in_forward_is_refused(phantoms, small, tmp_path, tiny_plugins):
    def forward(self, batch, rng):
        if "late" not in dict(self.named_children()):
            self.late = torch.nn.Linear(2, 2)
        return type(self).__mro__[1].forward(self, batch, rng)

    with pytest.raises(
        TrainingError, match=r"changed\.late\.bias: made by forward, .* in the proxy's __init__"
    ):
        ssl3d.pretrain(changed(forward), data=phantoms, out=tmp_path / "run", steps=2, **small)


def test_a_lazy_layer_is_refused(phantoms, small, tmp_path, tiny_plugins):
    def start(self):
        self.head = torch.nn.LazyLinear(2)

    kind = changed(lambda self, batch, rng: None, start)
    with pytest.raises(PluginError, match=r"proxy 'changed': head\.weight is of a lazy layer"):
        ssl3d.pretrain(kind, data=phantoms, out=tmp_path / "run", steps=2, **small)
    assert not (tmp_path / "run").exists()


def test_an_encoder_that_nothing_reaches_is_said(train, phantoms, small, tmp_path, tiny_plugins, capsys):
    def forward(self, batch, rng):
        loss = self.head(self.encoder.embed(batch["image"]).detach()).square().mean()
        return StepOutput(loss, {"error": loss.detach()})

    ssl3d.pretrain(changed(forward), data=phantoms, out=tmp_path / "cut", steps=2, **small)
    assert "no gradient reached the encoder" in capsys.readouterr().out
    train(steps=2)
    assert "no gradient reached" not in capsys.readouterr().out


def test_held_out_volumes_that_cannot_be_read_do_not_end_a_run(train, capsys, monkeypatch):
    import ssl3d.training.online as online
    from ssl3d.errors import DataError
    from ssl3d.training.loader import Loader

    whole, centre, broken = Loader.__iter__, online.centre_crops, []

    def hopeless(self):  # the loader of held-out subjects alone has an end
        if self.steps is None:
            return whole(self)
        raise DataError("no volume can be drawn for tiny")

    def unreadable(volume, *words):
        if not broken:
            broken.append(volume.id)
        if volume.id in broken:
            raise DataError(f"{volume.id}: damaged")
        return centre(volume, *words)

    monkeypatch.setattr(Loader, "__iter__", hopeless)
    monkeypatch.setattr(online, "centre_crops", unreadable)
    run = train(eval_every=2)
    assert run.finished and broken
    assert "held-out subjects have no metrics: no volume can be drawn for tiny" in capsys.readouterr().out
    assert "online/knn_accuracy" in run.metrics[3] and "holdout/tiny/loss" not in run.metrics[3]


def test_ranks_agree_on_a_second_trial(train, monkeypatch):
    # On a slow rank one pass is enough, but its losses would be waited for by the others.
    from ssl3d.training.trainee import Reducer

    calls, flags = [], []
    mean, forward = Reducer.mean, Trainee.forward

    def other_rank_is_slow(self, parts, flag=0):
        if not self.names and not parts:
            flags.append(flag)
            return {}, 1
        return mean(self, parts, flag)

    def counted(self, task, given, step=0):
        calls.append(step)
        return forward(self, task, given, step)

    monkeypatch.setattr(Reducer, "mean", other_rank_is_slow)
    monkeypatch.setattr(Trainee, "forward", counted)
    train(steps=1, eval_every=-1)
    assert calls.count("trial") == 1 and flags == [0]


def test_what_start_epoch_draws_depends_on_seed_and_epoch_alone(phantoms, small, tmp_path, tiny_plugins):
    from tiny_ssl3d_plugins import Tiny

    drawn = []

    class Clusters(Tiny):
        """Draws from the global generator, as a clustering does."""

        def start_epoch(self, epoch, loader):
            drawn.append((epoch, float(torch.rand(()))))

    for name in "ab":
        torch.manual_seed(ord(name))
        torch.rand(ord(name))
        ssl3d.pretrain(
            Clusters, data=phantoms, out=tmp_path / name, **small, steps=5, epochs=0.0, eval_every=-1,
            clusters={"dropout": 0.1 if name == "b" else 0.0},
        )  # fmt: skip
    half = len(drawn) // 2
    assert half >= 2 and drawn[:half] == drawn[half:]
    assert len({value for _, value in drawn}) == half


def test_what_the_user_says_stands_above_the_recipe(tiny_plugins):
    plan = plan_from({"proxy": "tiny", "lr": 0.1}, "x")
    assert (plan.options.lr, plan.options.batch_size, plan.options.optimizer) == (0.1, 4, "sgd")
    both = plan_from({"proxy": ["tiny", "other"]}, "x")
    assert (both.options.lr, both.options.weight_decay) == (0.003, 0.01)
    asked = request_of(["--proxy", "tiny", "--batch-size", "6"])
    assert (asked.plan.options.batch_size, asked.plan.options.lr) == (6, 0.003)


@pytest.mark.parametrize(
    "words", [[], ["--steps", "0"], ["--epochs", "0"], ["--steps", "0", "--epochs", "0"]]
)
def test_a_length_of_0_is_the_usual_one(tiny_plugins, words):
    assert request_of(["--proxy", "tiny", *words]).plan.options.steps == STEPS


def test_the_configuration_makes_the_same_plan_again(train, tmp_path):
    run = train(epochs=1.0, steps=0, weights=[2.0])
    path = run.folder / "config.yaml"
    again = request_of(["--config", str(path)]).plan
    assert again.as_config() == yaml.safe_load(path.read_text(encoding="utf-8"))
    assert again.options.steps >= 1 and again.options.epochs == 0


def test_a_folder_that_is_not_empty_is_refused(train, tmp_path):
    first = train()
    with pytest.raises(UsageError, match="not empty; --overwrite"):
        train()
    assert weights(train(overwrite=True)) == weights(first)
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no run"):
        train("precious", overwrite=True)
    assert (other / "thesis.txt").exists()


def test_runs_are_numbered_by_default(tiny_plugins, phantoms, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        run = ssl3d.pretrain("tiny", data=phantoms, **small, steps=1, eval_every=-1)
        assert str(run.folder) == f"runs/tiny-{number}"


def test_init_loads_the_encoder_once(train, monkeypatch):
    from ssl3d.training import build, pretrain

    first = train("a", steps=1)
    loads = []

    def load(spec, seed):
        loads.append(spec)
        return encoder_from(spec, seed)

    encoder_from = pretrain.encoder_from
    for module in (build, pretrain):
        monkeypatch.setattr(module, "encoder_from", load)
    second = train("b", init=str(first.folder), steps=1)
    assert loads == [str(first.folder)]
    assert second.encoder.metadata["init"]["sha256"] == first.encoder.metadata["sha256"]


def test_a_run_starts_from_an_encoder(train, phantoms):
    first = train("a", steps=3)
    second = train("b", init=str(first.folder), steps=1, lr=1e-12)
    assert close(state(first), state(second), 1e-7)
    assert second.encoder.metadata["init"]["sha256"] == first.encoder.metadata["sha256"]
    with pytest.raises(UsageError, match="is a resnet10"):
        ssl3d.pretrain("tiny", data=phantoms, init=str(first.folder), encoder="resnet18", precision="32")


def test_a_proxy_may_be_given_as_a_class(phantoms, small, tmp_path, tiny_plugins):
    from tiny_ssl3d_plugins import Tiny

    class Mine(Tiny):
        """Mine."""

    run = ssl3d.pretrain(Mine, data=phantoms, out=tmp_path / "run", **small, steps=2)
    assert "mine/loss" in run.metrics[0]
    assert type(run.proxies["mine"]) is Mine  # in this process, which was given it


def test_a_class_that_another_would_later_be_taken_for_is_refused(phantoms, small, tmp_path, tiny_plugins):
    from tiny_ssl3d_plugins import Tiny

    kind = type("MAE", (Tiny,), {"__module__": __name__})
    with pytest.raises(PluginError, match="proxy MAE: another proxy called 'mae' is installed"):
        ssl3d.pretrain(kind, data=phantoms, out=tmp_path / "run", **small, steps=2)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_every_optimizer_trains(train, optimizer):
    run = train(optimizer=optimizer, steps=2, weight_decay=1e-4, eval_every=-1)
    assert run.finished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5, "epochs": 1.0}, "epochs"),
        ({"batch_size": 5, "accumulate": 2}, "multiple of --accumulate 2"),
        ({"optimizer": "lars", "weight_decay": 0.0}, "switches the scaling of lars off"),
        ({"precision": "16"}, "needs a CUDA device"),
        ({"strategy": "fsdp", "precision": "16"}, "16 needs a CUDA device"),
        ({"weights": [1.0, 2.0]}, "weights has 2 values for 1"),
        ({"save_at": [2.0]}, "save_at"),
        ({"stepps": 3}, "unknown option stepps"),
        ({"tiny": {"size": 1}}, "size is 1"),
    ],
)
def test_wrong_options_are_told_in_one_line(train, options, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        train(**options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [None, "a"])
def test_the_next_command_asks_for_labels_where_these_data_have_none(label, train, tmp_path, capsys):
    from ssl3d.data.store.record import Record
    from ssl3d.data.store.writer import assemble, write_part

    parts, store = tmp_path / "s.partial", tmp_path / "my scans.h5"
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    for k in range(9):
        record = Record(id=f"v{k}", dataset="made", subject=f"p{k}", label=label, split="train")
        write_part(parts, record.id, record, image + k)
    assemble(parts, store, {}, [])
    train(data=str(store), steps=1, eval_every=-1)
    data = f"'{store}'" if label else "LABELLED.csv"  # as a shell takes it
    assert f"next: ssl3d linear-probe {tmp_path / 'run'} --data {data} --out" in capsys.readouterr().out
