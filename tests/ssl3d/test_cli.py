import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from ssl3d import cli, plugins
from ssl3d.errors import PluginError


def test_help_imports_nothing_heavy():
    code = (
        "import sys, ssl3d.cli as c; c.main(['--help']);"
        "heavy = {'torch', 'numpy', 'jsonargparse', 'yaml', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "does not import" not in done.stdout, done.stdout


@pytest.mark.parametrize("command", plugins.names(plugins.COMMANDS))
def test_every_command_tells_its_options(command, capsys):
    try:
        assert cli.main([command, "--help"]) == 0
    except SystemExit as stop:
        assert stop.code in (0, None)
    out = capsys.readouterr().out
    assert "usage: ssl3d" in out
    assert command in out


def test_no_command_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pretrian"], "Did you mean pretrain"),
        (["--steps", "3"], "a command must come first"),
        (["info", "a" * 300], "aaa...: a name of 300 characters"),
        (["embed", "scratch:" + "b" * 300], "may be named too"),
        (["prepare", "x", "--out", "c" * 300 + ".h5"], "no file can have it"),
        (["predict", "d" * 300, "--data", "phantoms:4"], "no file can have it"),
    ],
)
def test_wrong_words_give_one_line_and_status_2(argv, said, capsys):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


class FakePoint:
    name = "broken"
    value = "nowhere:Thing"
    dist = None

    def load(self):
        raise ImportError("no module named nowhere")


def test_a_broken_plugin_is_reported_by_name_and_breaks_no_other(monkeypatch):
    real = plugins._installed(plugins.ENCODERS)
    monkeypatch.setattr(plugins, "_installed", lambda group: {**real, "broken": FakePoint()})
    loaded, failed = plugins.load_all(plugins.ENCODERS)
    assert set(loaded) == set(real)
    assert "no module named nowhere" in str(failed["broken"])
    with pytest.raises(PluginError, match=r"broken.*nowhere:Thing"):
        plugins.load(plugins.ENCODERS, "broken")


def test_an_unknown_plugin_gets_suggestions():
    with pytest.raises(PluginError, match=r"unknown proxy 'sortng'\. Did you mean sorting\?"):
        plugins.load(plugins.PROXIES, "sortng")


def test_name_of_finds_the_registered_name():
    assert plugins.name_of(plugins.ENCODERS, plugins.load(plugins.ENCODERS, "resnet18")) == "resnet18"


HELPS = """
import contextlib, json, os, sys
from ssl3d import cli
heavy = {"torch", "lightly", "torchio", "SimpleITK", "sklearn", "matplotlib", "jsonargparse"}
for command in sys.argv[2:]:
    if not os.fork():
        told = open(os.path.join(sys.argv[1], command), "w")
        sys.stdout = told
        with contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        json.dump(sorted(heavy & set(sys.modules)), told)
        told.close()
        os._exit(0)
    os.wait()
"""
"""Every command's help, each in a process that starts with `ssl3d.cli` alone."""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("helps")
    words = [sys.executable, "-c", HELPS, folder, *plugins.names(plugins.COMMANDS)]
    subprocess.run(words, check=True)
    return folder


@pytest.mark.parametrize("command", plugins.names(plugins.COMMANDS))
def test_the_help_of_a_command_imports_no_torch(command, helps):
    usage, _, heavy = (helps / command).read_text(encoding="utf-8").rpartition("\n")
    assert "usage: ssl3d" in usage and heavy == "[]"


@pytest.mark.parametrize("command", ["pretrain", "embed", "linear-probe", "knn", "finetune", "localize"])
@pytest.mark.parametrize("words", [["--device", "gpu"], ["--accelerator=gpu"]])
def test_every_command_takes_its_device_by_the_same_word(command, words, capsys):
    more = ["--proxy", "simclr"] if command == "pretrain" else ["x"]
    with contextlib.suppress(SystemExit):
        cli.main([command, *more, *words, "--print_config"])
    assert "device: cuda\n" in capsys.readouterr().out


def test_an_error_names_the_command_once(capsys):
    assert cli.main(["linear-probe", "x", "--target", "nope"]) == 2
    assert capsys.readouterr().err.startswith("ssl3d linear-probe: --target: 'nope' is none of")
    assert cli.main(["pretrain", "--proxy", "simclr", "--lr", "0"]) == 2
    assert capsys.readouterr().err == "ssl3d pretrain: --lr is 0.0, must be above 0\n"


def test_a_plugin_that_is_named_and_not_there_is_an_error_of_one_line(capsys):
    assert cli.main(["proxies", "nope"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "unknown proxy 'nope'" in printed.err


@pytest.mark.parametrize("command", ["linear-probe", "knn", "finetune"])
def test_the_help_names_every_kind_of_encoder(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in ("RUN:stem_stride=1", "FILE.pth", ".safetensors", "scratch:NAME", "imagenet:NAME"):
        assert words in told


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_a_command_in_one_line_and_its_status(name, request, monkeypatch, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    if name == "SIGINT" and before is signal.SIG_IGN:  # the tests run in the background of a shell
        signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))
        before = signal.default_int_handler

    def run(argv):
        os.kill(os.getpid(), number)
        time.sleep(10)
        raise AssertionError

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["prepare"]) == 128 + number
    error = capsys.readouterr().err
    assert error == ("ssl3d: interrupted\n" if name == "SIGINT" else f"ssl3d: stopped by {name}\n")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_a_callback_is_not_dropped(name):
    code = f"""
import os, signal, sys, time, weakref
from ssl3d import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
class Thing: pass
def freed(thing):
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000): pass
def run(argv):
    thing = Thing()
    reference = weakref.ref(thing, freed)
    del thing  # Python ignores what its callback raises
    time.sleep(20)
cli._run = run
sys.exit(cli.main(["prepare"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr == ("ssl3d: interrupted\n" if name == "SIGINT" else f"ssl3d: stopped by {name}\n")


def test_a_signal_before_the_first_step_of_a_command_ends_it_in_one_line(tmp_path):
    words = ["pretrain", "--proxy", "simclr", "--data", "phantoms:400", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "SSL3D_CACHE": str(tmp_path / "cache")}
    started = subprocess.Popen(
        [sys.executable, "-m", "ssl3d", *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    while started.poll() is None and not list(tmp_path.glob("cache/phantoms/.*.partial")):
        time.sleep(0.05)
    started.terminate()
    error = started.communicate(timeout=100)[1]
    assert started.returncode == 128 + signal.SIGTERM and error == "ssl3d: stopped by SIGTERM\n"
    assert not list(tmp_path.glob("cache/phantoms/.*")) and not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", [["--help"], ["encoders"], ["embed", "--help"]])
def test_an_output_that_is_full_is_told_in_one_line(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ssl3d", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3 and done.stderr == "ssl3d: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MemoryError(), 3, "ssl3d: out of memory; call again"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "ssl3d: out of memory"),
        (OSError(errno.EMFILE, "x"), 3, "ssl3d: Too many open files"),
        (OSError(errno.EFBIG, "x", "a.pt"), 3, "ssl3d: a.pt: File too large"),
        (OSError(errno.EROFS, "x", "a.pt"), 2, "ssl3d: a.pt: Read-only file system"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, status, said, monkeypatch, capsys):
    def failing(argv):
        raise error

    monkeypatch.setattr(plugins, "load", lambda group, name: SimpleNamespace(main=failing))
    assert cli.main(["embed"]) == status
    told = capsys.readouterr().err
    assert told.startswith(said) and told.count("\n") == 1


def test_any_other_error_of_a_command_keeps_its_traceback(monkeypatch):
    def failing(argv):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(plugins, "load", lambda group, name: SimpleNamespace(main=failing))
    with pytest.raises(RuntimeError, match="a mistake"):
        cli.main(["embed"])
