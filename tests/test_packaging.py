"""The wheel, and the README's own proxy as a real separate distribution."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "ssl3d", "proxies", "benchmarks"]


def test_the_images_are_built_from_what_a_wheel_needs():
    """Each recipe copies what the wheel of these tests is built from, and pins it by the constraints."""
    wanted = {*SOURCES, "constraints.txt"}
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", docker, re.MULTILINE)
    assert {name for line in copied for name in line.split()} == wanted
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(kept) == wanted, "scans or runs of the working folder could slip into an image"
    files = (ROOT / "apptainer.def").read_text(encoding="utf-8").split("%files")[1].split("%")[0]
    assert {line.split()[0] for line in files.strip().splitlines()} == wanted
    assert re.search(r"^USER (?!root|0)\w+$", docker, re.MULTILINE), "the image runs as root"
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    for recipe in (docker, (ROOT / "apptainer.def").read_text(encoding="utf-8")):
        named = re.search(r"(?i)extras=([\w,]+)", recipe)[1].split(",")
        assert set(named) <= set(extras["options.extras_require"])


def run(*command, path=(), cwd=None, **env):
    paths = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": paths, **env},
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",  # whatever the locale that a library of another test has set
    )


def build(source, out):
    done = run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source)
    assert done.returncode == 0, done.stderr
    return next(Path(out).glob("*.whl"))


def install(wheel, target):
    done = run("-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in SOURCES:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=ignore)
        else:
            shutil.copy(origin, source / name)
    return build(source, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_three_packages_and_nothing_else_on_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {
        "ssl3d",
        "ssl3d_proxies",
        "ssl3d_benchmarks",
    }
    assert "ssl3d/py.typed" in names


def test_the_wheel_holds_every_file_that_lies_in_the_packages(wheel):
    """Style sheets, suites and stubs lie beside the modules that read them; setup.cfg names each."""
    packages = {"ssl3d": "ssl3d", "proxies": "ssl3d_proxies", "benchmarks": "ssl3d_benchmarks"}
    wanted = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in packages.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and not {"__pycache__", "results", "scripts"} & set(file.relative_to(ROOT).parts)
    }
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_tells_the_help_of_every_command(wheel, tmp_path):
    install(wheel, tmp_path / "site")
    code = (
        "import ssl3d, sys; assert ssl3d.__file__.startswith(sys.argv[1]), ssl3d.__file__\n"
        "from ssl3d import cli, plugins\n"
        "for name in plugins.names(plugins.COMMANDS):\n"
        "    try: assert cli.main([name, '--help']) == 0, name\n"
        "    except SystemExit as stop: assert not stop.code, (name, stop.code)\n"
    )
    done = run("-c", code, tmp_path / "site", path=[tmp_path / "site"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def readme_proxy():
    """The README's complete example: its file name and its code."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n# (\w+\.py): (.*?)```", text, re.DOTALL)


def test_the_readme_proxy_is_short():
    code = [
        line for line in readme_proxy()[2].splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(code) < 60


def test_the_readme_proxy_trains_as_a_distribution_of_its_own(tmp_path):
    text = (ROOT / "docs" / "how-to" / "proxy.md").read_text(encoding="utf-8")
    file = readme_proxy()[1]
    source = tmp_path / "source"
    source.mkdir()
    (source / file).write_text(
        "# " + readme_proxy()[0].removeprefix("```python\n# ").removesuffix("```"), encoding="utf-8"
    )
    toml = re.search(r"```toml\n# pyproject\.toml\n(.*?)```", text, re.DOTALL)[1]
    (source / "pyproject.toml").write_text(toml, encoding="utf-8")
    install(build(source, tmp_path / "wheel"), tmp_path / "site")
    name = re.search(r'\[project\.entry-points\."ssl3d\.proxies"\]\n(\w+) *=', toml)[1]

    def ssl3d(*argv):
        done = run(
            "-m",
            "ssl3d",
            *argv,
            path=[tmp_path / "site"],
            cwd=tmp_path,
            SSL3D_CACHE=str(tmp_path / "cache"),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert name in ssl3d("proxies")
    ssl3d(
        *("pretrain", "--proxy", name, "--data", "phantoms:8", "--steps", "3", "--batch-size", "4"),
        *("--workers", "0", "--out", "run", "--encoder", "resnet10", "--resnet10.width", "8"),
    )
    assert (tmp_path / "run" / "encoder" / "encoder.safetensors").exists()
    check = f"from ssl3d.testing import check_proxy; check_proxy({name!r})"
    done = run("-c", check, path=[tmp_path / "site"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
