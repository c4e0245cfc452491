"""A proxy or an encoder from one file that no package installs."""

import hashlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import yaml

import ssl3d
from ssl3d import cli, plugins
from ssl3d.checkpoint.card import read_card, signed
from ssl3d.checkpoint.proxies import load_proxies
from ssl3d.checkpoint.snapshot import config_of
from ssl3d.errors import CheckpointError, PluginError, UsageError
from ssl3d.testing import check_encoder, check_proxy
from ssl3d.training.options import plan_from, request_of

from .conftest import TINY

ONE = TINY.partition("class Other")[0]
ENCODER = '''
"""An encoder in a file."""

from ssl3d.encoders.resnet import ResNet10


class Mine(ResNet10):
    """ResNet-10 under a name of its own."""

    name = "mine_net"
'''


@pytest.fixture
def one(tmp_path):
    """A file with one proxy."""
    return written(tmp_path / "authors" / "turn-it.py", ONE)


def written(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def ssl3d_says(*words, cwd=None, **env):
    done = subprocess.run(
        [sys.executable, "-m", "ssl3d", *map(str, words)], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, **env}, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# Naming it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", ":Tiny"])
def test_a_file_is_a_proxy_and_its_stem_names_the_section(one, more, capsys):
    words = ["pretrain", "--proxy", f"{one}{more}", "--turn_it.size", "9"]
    assert cli.main([*words, "--print_config"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["proxy"] == [f"{one}:Tiny"] and values["turn_it"]["size"] == 9
    assert values["optimizer"] == "sgd"  # its recipe
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    assert "--turn_it.size" in capsys.readouterr().out


def test_a_configuration_with_a_file_is_read_back(one, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(one.parent)
    assert cli.main(["pretrain", "--proxy", one.name, "--turn_it.size", "9", "--print_config"]) == 0
    config = written(tmp_path / "c.yaml", capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    plan = request_of(["--config", str(config)]).plan
    assert plan.options.proxy == ("turn_it",) and plan.proxies["turn_it"][1].size == 9
    other = request_of(["--config", str(config), "--proxy", "sorting"]).plan
    assert list(other.proxies) == ["sorting"]


def test_the_attribute_name_comes_before_the_stem(tmp_path):
    path = written(
        tmp_path / "a" / "b.py", ONE.replace("    Config = ", '    name = "turns"\n    Config = ')
    )
    assert plugins.find(plugins.PROXIES, str(path))[0] == "turns"


def test_a_class_of_a_module_in_the_working_directory(one, monkeypatch):
    one.rename(one.parent / "turner_of_crops.py")
    monkeypatch.chdir(one.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    plan = request_of(["--proxy", "turner_of_crops:Tiny", "--turner_of_crops.size", "9"]).plan
    assert plan.as_config()["proxy"] == ["turner_of_crops:Tiny"]
    assert plan.proxies["turner_of_crops"][1].size == 9


def test_a_registered_class_keeps_its_name():
    name, made = plugins.find(plugins.PROXIES, "ssl3d_proxies.sorting:Sorting")
    assert name == "sorting" and plugins.source_of(plugins.PROXIES, made) is None


def test_from_python_a_file_may_be_a_path(one):
    assert list(plan_from({"proxy": one, "data": ["phantoms"]}, "pretrain").proxies) == ["turn_it"]


def test_two_files_of_one_name_are_told_apart_by_their_authors(one, tmp_path):
    other = written(tmp_path / "others" / "turn_it.py", ONE)
    with pytest.raises(UsageError, match=r"two of turn_it, turn_it, resnet18 have the same name"):
        request_of(["--proxy", str(one), str(other)])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "two.py",
            TINY,
            "defines 2 classes of the kind, Tiny and Other; name one of them, as in two.py:Tiny",
        ),
        ("none.py", "x = 1\n", "defines no subclass of ssl3d.api.Proxy"),
        ("bad.py", "x = 1\ny = = 2\n", "line 2: SyntaxError: invalid syntax"),
        ("gone.py", "x = 1\nimport nowhere_at_all\n", "line 2: ModuleNotFoundError: No module named 'nowh"),
        ("ends.py", "import sys\n\nsys.exit(3)\n", "line 3: SystemExit: 3"),
        ("bare.py", ONE.replace('paper = "Nobody: Nothing, 2020"', "pass"), "class Tiny lacks paper"),
        ("half.py", ONE.replace("def draw", "def paint"), "Tiny lacks draw"),
        ("sorting.py", ONE, "another proxy called 'sorting' is installed; give the class another `name`"),
        ("steps.py", ONE, "called 'steps' like an option of ssl3d pretrain; give"),
        ("x.py:Missing", ONE, "defines no Missing (it has Tiny)"),
        ("x.py:TinyConfig", ONE, "TinyConfig is no subclass of ssl3d.api.Proxy"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(name, text, said, tmp_path, capsys):
    written(tmp_path / "wrong" / name.partition(":")[0], text)
    assert cli.main(["pretrain", "--proxy", str(tmp_path / "wrong" / name)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_a_module_that_fails_is_named_with_its_line(tmp_path, monkeypatch, capsys):
    written(tmp_path / "m" / "fails_here.py", "x = 1\nx.y\n")
    monkeypatch.syspath_prepend(str(tmp_path / "m"))
    assert cli.main(["pretrain", "--proxy", "fails_here:Tiny"]) == 2
    error = capsys.readouterr().err
    assert "fails_here.py, line 2: AttributeError" in error and error.count("\n") == 1


def test_an_unknown_name_tells_of_files(one, monkeypatch):
    with pytest.raises(PluginError, match=r"a file .* or module:Class may be named too.*pip install -e"):
        check_proxy("turns_it")
    (one.parent / "turnit.py").write_text(ONE, encoding="utf-8")
    monkeypatch.chdir(one.parent)
    with pytest.raises(PluginError, match=r"Did you mean the file here, turnit\.py\?"):
        check_proxy("turnit")
    with pytest.raises(PluginError) as caught:
        plugins.load(plugins.COMMANDS, "turnit")
    assert "file" not in str(caught.value)


def test_a_file_is_checked_and_listed(one, capsys):
    with pytest.raises(AssertionError, match="Tiny"):
        check_proxy(str(one), steps=1, fall=0.99)  # it gets as far as the proxy itself
    assert cli.main(["proxies", str(one)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("turn_it\n") and "mean and the spread of a crop" in told
    assert "sorting" not in told


def test_a_changed_file_is_read_again(one):
    first = plugins.find(plugins.PROXIES, str(one))[1]
    assert plugins.find(plugins.PROXIES, str(one))[1] is first
    one.write_text(ONE.replace("size: int = 12", "size: int = 13"), encoding="utf-8")
    assert plugins.find(plugins.PROXIES, str(one))[1].Config().size == 13 and first.Config().size == 12
    assert not (one.parent / "__pycache__").exists()


# Other processes ----------------------------------------------------------------------------------


def test_a_class_unpickles_in_a_bare_process_from_the_same_bytes_alone(one, tmp_path):
    made = plugins.find(plugins.PROXIES, str(one))[1]
    pickled = tmp_path / "p"
    pickled.write_bytes(pickle.dumps((made, made.Config(size=7))))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))[1].size)"

    def load():
        command = [sys.executable, "-c", code, str(pickled)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = load()
    assert done.stdout == "7\n", done.stderr
    one.write_text(ONE + "\n", encoding="utf-8")
    assert "has changed since another process read it" in load().stderr


SPAWN = """
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from ssl3d import cli
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_workers_that_are_spawned_know_the_class(one, phantoms, flags, tmp_path):
    script = written(tmp_path / "main" / "spawn.py", SPAWN)
    words = ["pretrain", "--proxy", str(one), "--data", phantoms, "--steps", "2", "--workers", "1", *flags]
    done = subprocess.run(
        [sys.executable, str(script), *words, "--eval-every", "-1", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "encoder" / "encoder.json").is_file()


@pytest.mark.long
def test_two_processes_train_it(one, phantoms, flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["ssl3d", "pretrain", "--proxy", one.name, "--data", phantoms, "--steps", "2", "--workers"]
    command += ["0", *flags, "--eval-every", "-1", "--out", str(tmp_path / "run")]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC", "RANK"))}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, cwd=one.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout and list(read_card(tmp_path / "run" / "encoder")["proxies"])


# The run ------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(one, phantoms, small, tmp_path):
    """A run of the file that was stopped after two of four steps."""
    run = ssl3d.pretrain(
        str(one), data=phantoms, out=tmp_path / "run", steps=4, eval_every=-1, turn_it={"signal_at": 1},
        **small,
    )  # fmt: skip
    assert run.stopped and run.done == 2
    return run.folder


def test_a_run_goes_on_and_its_card_keeps_the_hash(stopped, one, phantoms):
    assert config_of(stopped)["proxy"] == [f"{one}:Tiny"]
    one.write_text("# A comment.\n" + ONE, encoding="utf-8")  # computes the same
    assert ssl3d.resume(stopped).finished
    card = read_card(stopped / "encoder")
    assert list(card["proxies"]) == ["turn_it"] and card["citations"]["turn_it"] == "Nobody: Nothing, 2020"
    record = card["plugins"]["turn_it"]
    assert record["from"] == f"{one}:Tiny"
    assert record["sha256"] == hashlib.sha256(ONE.encode()).hexdigest()


def test_a_changed_or_missing_file_stops_resume_with_one_line(stopped, one, capsys):
    one.write_text(ONE.replace("zeros(2)", "ones(2)"), encoding="utf-8")
    assert cli.main(["pretrain", "--resume", str(stopped)]) == 2
    error = capsys.readouterr().err
    assert f"{one}:Tiny has changed (sha256" in error and "put it back" in error and error.count("\n") == 1
    moved = one.rename(one.parent / "moved.py")
    assert cli.main(["pretrain", "--resume", str(stopped)]) == 2
    error = capsys.readouterr().err
    assert f"{one}: No such file" in error and "config.yaml" in error and error.count("\n") == 1
    # Where it has moved to can be said in config.yaml.
    (moved.parent / "elsewhere").mkdir()
    moved = moved.rename(moved.parent / "elsewhere" / one.name)
    moved.write_text(ONE, encoding="utf-8")
    config = stopped / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(one), str(moved)), encoding="utf-8")
    assert ssl3d.resume(stopped).finished


def test_the_encoder_needs_no_file_and_the_heads_say_what_they_need(stopped, one, phantoms, monkeypatch):
    assert ssl3d.resume(stopped).finished
    assert "turn_it" in load_proxies(stopped)  # this process has the class
    one.unlink()
    code, _, error = ssl3d_says("embed", stopped, "--data", phantoms, "--out", stopped / "e.h5")
    assert code == 0, error
    plugins._by_name.clear()
    with pytest.raises(CheckpointError, match=r"set SSL3D_PLUGINS=.*turn-it\.py:Tiny, or install it"):
        load_proxies(stopped)
    one.write_text(ONE, encoding="utf-8")
    with pytest.raises(CheckpointError, match="SSL3D_PLUGINS"):  # a card's word does not run a file
        load_proxies(stopped)
    monkeypatch.setenv("SSL3D_PLUGINS", f"{one}")
    assert "turn_it" in load_proxies(stopped)
    plugins._by_name.clear()
    one.write_text(ONE.replace("zeros(2)", "ones(2)"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has changed"):
        load_proxies(stopped)


# Encoders -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_encoder_from_a_file(one, phantoms, tmp_path, monkeypatch):
    net = written(tmp_path / "nets" / "net.py", ENCODER)
    check_encoder(f"{net}:Mine", plugins.find(plugins.ENCODERS, str(net))[1].Config(width=4))
    words = ["--mine_net.width", "4", "--mine_net.norm", "group", "--mine_net.norm-groups", "2"]
    run = tmp_path / "run"
    words += ["--data", phantoms, "--steps", "2", "--workers", "0", "--eval-every", "-1", "--out", str(run)]
    assert cli.main(["pretrain", "--proxy", str(one), "--encoder", str(net), *words]) == 0
    card = json.loads((run / "encoder" / "encoder.json").read_text(encoding="utf-8"))
    assert card["architecture"] == "mine_net" and set(card["plugins"]) == {"mine_net", "turn_it"}
    assert config_of(run)["encoder"] == f"{net}:Mine"
    assert type(ssl3d.load_encoder(run)).__name__ == "Mine"
    assert type(ssl3d.encoder_from(f"scratch:{net}:width=4")).__name__ == "Mine"
    embed = ("embed", run, "--data", phantoms, "--out", tmp_path / "e.h5")
    code, _, error = ssl3d_says(*embed)
    assert code == 2 and f"SSL3D_PLUGINS={net}:Mine" in error and error.count("\n") == 1
    code, _, error = ssl3d_says(*embed, SSL3D_PLUGINS=f"{one},{net}")
    assert code == 0, error


def test_a_card_that_calls_a_file_its_architecture_runs_nothing(one, phantoms, small, tmp_path):
    run = ssl3d.pretrain(one, data=phantoms, out=tmp_path / "run", steps=1, eval_every=-1, **small)
    ran = tmp_path / "ran"
    evil = written(tmp_path / "evil" / "evil.py", f"open({str(ran)!r}, 'w')\n")
    path = run.folder / "encoder" / "encoder.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    for words in (
        {"architecture": str(evil)},
        {"architecture": "x", "plugins": {"x": {"from": str(evil)}}},
    ):
        path.write_text(signed(card | words), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"evil|'x'"):
            ssl3d.load_encoder(run.folder)
    assert not ran.exists()


# What goes wrong in it ----------------------------------------------------------------------------


@pytest.mark.long
def test_a_proxy_that_fails_at_once_ends_with_workers_too(one, phantoms, tmp_path):
    """Workers wait for the next batch then, and a program's end waits for them."""
    text = one.read_text(encoding="utf-8").replace("    def forward(", "    def forward(self, *given):\n"
        "        raise KeyError('mine')\n\n    def other(", 1)  # fmt: skip
    one.write_text(text, encoding="utf-8")
    words = ["--data", phantoms, "--steps", 3, "--workers", 1, "--out", tmp_path / "run"]
    status, _, error = ssl3d_says("pretrain", "--proxy", one, *words, "--encoder", "resnet10",
                                  "--resnet10.width", 8)  # fmt: skip
    assert status == 1 and "KeyError: 'mine'" in error


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("return loss", "forward returned a Tensor, not StepOutput(loss, metrics)"),
        ("return StepOutput(loss[None].repeat(2))", "the loss that forward returned is of shape (2,)"),
        ("return StepOutput(loss, {'error': 1.0})", "error that forward returned is float, not a scalar"),
    ],
)
def test_what_forward_returns_is_checked(one, phantoms, tmp_path, capsys, line, told):
    text = one.read_text(encoding="utf-8")
    one.write_text(
        text.replace("return StepOutput(", f"{line}\n        return StepOutput("), encoding="utf-8"
    )
    words = [
        "pretrain",
        "--proxy",
        str(one),
        "--data",
        phantoms,
        "--steps",
        "2",
        "--out",
        str(tmp_path / "r"),
    ]
    assert cli.main([*words, "--encoder", "resnet10", "--resnet10.width", "8", "--workers", "0"]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_proxy_says_while_drawing_is_one_line(one, phantoms, tmp_path, capsys, workers):
    text = one.read_text(encoding="utf-8").replace("        size = (config.size,) * 3\n", "        "
        "from ssl3d.errors import UsageError\n        raise UsageError('tiny: mine')\n", 1)  # fmt: skip
    one.write_text(text, encoding="utf-8")
    words = ["--proxy", str(one), "--data", phantoms, "--steps", "2", "--out", str(tmp_path / "r")]
    words += ["--encoder", "resnet10", "--resnet10.width", "8", "--workers", str(workers)]
    assert cli.main(["pretrain", *words]) == 2
    said = capsys.readouterr().err
    assert "tiny: mine" in said and "Traceback" not in said and "Caught" not in said


def test_one_number_in_a_batch_norm_says_what_to_do(one, phantoms, tmp_path, capsys):
    words = ["--proxy", str(one), "--data", phantoms, "--steps", "2", "--out", str(tmp_path / "r")]
    words += ["--encoder", "resnet10", "--resnet10.width", "8", "--workers", "0", "--batch-size", "1"]
    assert cli.main(["pretrain", *words]) == 1
    said = capsys.readouterr().err
    assert "batch norm has one number per channel" in said and "larger crops" in said
    assert "Traceback" not in said
