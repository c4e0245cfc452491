"""Loggers of pretraining: what W&B and MLflow read back, and that no logger ends or changes a training."""

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from ssl3d.training import loggers
from ssl3d.training.loggers import Loggers, missing_loggers, without_secrets


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No account, no server, and stores in the test's folder."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    for name, value in loggers._QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)  # where MLflow puts its artifacts


def weights(run):
    return hashlib.sha256((run / "encoder" / "encoder.safetensors").read_bytes()).hexdigest()


def wandb_records(folder):
    """The records in W&B's own files of a run's offline runs (logs of LevelDB), in their order."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, place, whole = path.read_bytes(), 7, b""  # behind the header of the file
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:  # the end of a block has no room for a header
                place += 32768 - place % 32768
                continue
            length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
            whole += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                records.append(record)
                whole = b""
    return records


def wandb_history(records):
    """Value by (name, step), of the curves."""
    points = {}
    for record in records:
        if record.HasField("history"):
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            points |= {(key, row["step"]): value for key, value in row.items() if key != "step"}
    return points


@pytest.mark.long
def test_mlflow_reads_what_a_run_logged_and_a_resumed_run_is_the_same_one(train, tmp_path):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from mlflow import MlflowClient

    import ssl3d

    plain = train("plain", logger=[], eval_every=2, checkpoint_every=2)
    assert not (tmp_path / "plain" / "tensorboard").exists()
    stopped = train(
        "run", logger=["mlflow"], eval_every=2, checkpoint_every=2, tiny={"signal_at": 1}, log_every=1
    )
    assert stopped.done == 2
    client = MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "ssl3d"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED" and run.info.run_name == "run"
    ssl3d.resume(stopped.folder)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    logged = client.get_metric_history(run.info.run_id, "run/loss")
    assert {p.step: pytest.approx(p.value) for p in logged} == {
        r["step"]: r["loss"] for r in stopped.metrics
    }
    assert run.data.params["steps"] == "4" and run.data.params["tiny.size"] == "12"
    names = {f.path for f in client.list_artifacts(run.info.run_id, "encoder")}
    assert names == {"encoder/encoder.json", "encoder/encoder.safetensors"}
    assert client.list_artifacts(run.info.run_id, "pictures")
    assert weights(stopped.folder) == weights(plain.folder)


def test_wandb_reads_what_a_run_logged_offline_and_a_resumed_run_is_the_same_one(train, tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    import ssl3d

    stopped = train(
        "run", logger=["wandb", "tensorboard"], eval_every=2, checkpoint_every=2, tiny={"signal_at": 1},
        log_every=1,
    )  # fmt: skip
    ssl3d.resume(stopped.folder)
    last = ("run/loss", stopped.metrics[-1]["step"])
    for _ in range(60):  # W&B's own process writes them, and may not be done
        records = wandb_records(tmp_path / "run")
        if last in wandb_history(records):
            break
        time.sleep(0.5)
    assert len({r.run.run_id for r in records if r.HasField("run")}) == 1
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    points = wandb_history(records)
    for row in stopped.metrics:
        assert points["run/loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)
    assert points["tiny/picture/_type", 2] == "image-file"
    config = {
        u.key: json.loads(u.value_json) for r in records if r.HasField("run") for u in r.run.config.update
    }
    assert config["steps"] == 4 and config["tiny"]["size"] == 12
    artifacts = [r.request.log_artifact.artifact for r in records if r.HasField("request")]
    artifacts += [r.artifact for r in records if r.HasField("artifact")]
    files = {entry.path for artifact in artifacts for entry in artifact.manifest.contents}
    assert {"encoder.json", "encoder.safetensors"} <= files
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.long
def test_a_run_with_every_logger_ends_with_the_bytes_of_one_without(train):
    for name in ("wandb", "mlflow"):
        pytest.importorskip(name, reason=f"needs the extra {name}")
    options = {"tiny": {"dropout": 0.5}, "eval_every": 1}
    with_all = train("all", logger=["tensorboard", "wandb", "mlflow"], **options)
    without = train("none", logger=[], **options)
    assert weights(with_all.folder) == weights(without.folder)


class Failing(loggers.TensorBoard):
    """A logger that fails where it is told to."""

    at = ""

    def __init__(self, run):
        super().__init__(run)
        if self.at == "start":
            raise RuntimeError("no answer from https://ann:hunter22@host/api, key abcdef123456")

    def _fail(self, *names):
        if self.at in names:
            raise OSError(28, "No space left on device")

    def scalars(self, values, step):
        self._fail("scalars")

    def picture(self, name, figure, path, step):
        self._fail("picture")

    def artefact(self, name, folder):
        self._fail("artefact")

    def close(self, finished):
        self._fail("close")


@pytest.mark.parametrize("at", ["start", "scalars", "picture", "artefact", "close"])
def test_a_logger_that_fails_ends_no_training_and_says_so_once(at, train, monkeypatch, capsys):
    monkeypatch.setattr(Failing, "at", at)
    monkeypatch.setitem(loggers.KINDS, "wandb", Failing)
    monkeypatch.setenv("SOME_API_KEY", "abcdef123456")
    run = train("run", logger=["wandb"], eval_every=1, log_every=1)
    assert run.finished
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "warning: logger wandb" in line]
    assert ("RuntimeError" if at == "start" else "No space left") in line
    assert "hunter22" not in shown and "abcdef123456" not in shown
    assert "hunter22" not in (run.folder / "train.log").read_text()


def test_a_logger_without_its_package_is_named_before_the_training(train, monkeypatch, capsys):
    monkeypatch.setattr(loggers.WandB, "package", "no_such_package")
    run = train("run", logger=["wandb", "tensorboard"])
    lines = capsys.readouterr().out.splitlines()
    told = next(n for n, line in enumerate(lines) if "pip install 'ssl3d[wandb]'" in line)
    assert told < next(n for n, line in enumerate(lines) if line.startswith("step "))
    assert run.finished and list((run.folder / "tensorboard").glob("events*"))


def test_a_server_that_is_not_there_ends_no_training(train, monkeypatch, capsys):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter22@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = train("run", logger=["mlflow"])
    shown = capsys.readouterr().out
    assert run.finished and shown.count("warning: logger mlflow is left out") == 1
    assert "hunter22" not in shown


def test_an_unknown_logger_is_refused():
    from ssl3d import cli

    assert cli.main(["pretrain", "--proxy", "simclr", "--logger", "tensorbord"]) == 2
    assert cli.main(["pretrain", "--proxy", "simclr", "--logger", "mlflow", "mlflow"]) == 2


def test_secrets_are_blotted_out(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    text = without_secrets("key 0123456789abcdef, open sesame, http://u:p@h/x, step 12")
    assert text == "key ***, ***, http://***@h/x, step 12"


def test_wandb_asks_nobody_for_a_key(monkeypatch, tmp_path):
    assert not loggers._knows_account()
    place = tmp_path / "netrc"
    place.write_text("machine api.wandb.ai login user password 0123456789abcdef\n")
    monkeypatch.setenv("NETRC", str(place))
    assert loggers._knows_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert not loggers._knows_account()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert loggers._knows_account()


def test_numbers_that_are_not_finite_stay_away(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Failing, "scalars", lambda self, values, step: seen.append((dict(values), step)))
    monkeypatch.setitem(loggers.KINDS, "mlflow", Failing)
    with Loggers(["mlflow"], tmp_path, "x", {}, print) as own:
        own.scalars({"loss": 1, "a/b": 0.5, "c": float("nan"), "d": None, "e": "text"}, 3)
    monkeypatch.setattr(Failing, "__init__", lambda self, run: seen.append(run.config))
    Loggers(["mlflow"], tmp_path, "x", {"data": ["s3://ann:hunter22@host/a"], "n": {"lr": 0.1}}, print)
    assert seen.pop() == {"data": ["s3://***@host/a"], "n": {"lr": 0.1}}
    assert seen == [({"run/loss": 1.0, "a/b": 0.5}, 3)]
    assert missing_loggers(["tensorboard"]) == []


@pytest.mark.long
def test_only_the_first_rank_logs(tiny_plugins, phantoms, flags, tmp_path):
    words = ["pretrain", "--proxy", "tiny", "--data", phantoms, *flags, "--steps", "2", "--devices", "2",
             "--workers", "0", "--device", "cpu", "--logger", "mlflow", "tensorboard",
             "--out", "run"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "ssl3d", *words], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "ssl3d"]
    assert len(client.search_runs([experiment.experiment_id])) == 1
