"""What the README and the pages show is there: commands parse, links lead somewhere, snippets run."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from ssl3d import cli, config, plugins
from ssl3d.api import request_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

from generate import GENERATED, is_generated, write_pages  # noqa: E402

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "benchmarks" / "results").glob("**/README.md")),
    *sorted(page for page in DOCS.rglob("*.md") if not is_generated(DOCS, page)),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TUTORIAL = DOCS / "getting-started" / "tutorial.md"
FENCE = re.compile(
    r"(?:^% (?P<mark>[^\n]+)\n)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
SMALL = {
    "pretrain": "--steps 2 --batch-size 4 --workers 0 --eval-every -1",
    "linear-probe": "--untrained 1 --samples 32 --precision bf16",
    "finetune": "--steps 2 --batch-size 2 --workers 0 --no-trivial --fractions 1 --eval-at 1",
    "report": "--resamples 100",
}
"""What makes the tutorial's commands short."""
AFTERWARDS = "runs after the tutorial"
"""Mark of a snippet that reads what the tutorial has made."""


def text_of(path):
    """The text of a page, or of the cells of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(path, *kinds):
    """(mark, body) of the fenced blocks of these kinds."""
    return [(f["mark"] or "", f["body"]) for f in FENCE.finditer(text_of(path)) if f["kind"] in kinds]


def prompts(body):
    """The command lines of a console, each on one line."""
    return [line[2:] for line in body.replace("\\\n", " ").splitlines() if line.startswith("$ ")]


def shown_commands(path):
    """The words of every command line that a page shows: after a prompt, or in a script."""
    lines = []
    for _, body in blocks(path, "console"):
        lines += prompts(body)
    for _, body in blocks(path, "bash"):
        lines += [line for line in body.replace("\\\n", " ").splitlines() if line and line[0] != "#"]
    return [shlex.split(re.sub(r"\$\(\(.*?\)\)", "1", line), comments=True) for line in lines]


def ssl3d_words(words):
    """What follows `ssl3d` on a command line, whatever starts it (srun, torchrun); None if not there."""
    starters = {"srun", "torchrun", "ssl3d", "python"}
    return words[words.index("ssl3d") + 1 :] if words[0] in starters and "ssl3d" in words else None


ALL = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}:{number}")
    for path in (*PAGES, *NOTEBOOKS)
    for number, words in enumerate(map(ssl3d_words, shown_commands(path)))
    if words is not None
]


class Understood(BaseException):
    """A command line was parsed, and nothing else is to happen."""


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The working directory of somebody who follows the pages: the files that commands name are there."""
    for page in PAGES:
        for mark, body in blocks(page, "python"):
            name = re.match(r"# (\w+\.py)", body)
            if mark.startswith("file ") or name:
                (tmp_path / (name[1] if name else mark.removeprefix("file "))).write_text(body)
    run = tmp_path / "runs" / "simclr"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("proxy: [simclr]\nsteps: 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL3D_CACHE", os.environ.get("SSL3D_CACHE", str(tmp_path / "cache")))
    return tmp_path


def parse(words, monkeypatch):
    """Has the command's own parser read its words, plugin options included, and do nothing."""
    if words[0] == "pretrain":
        request_of(words[1:])
        return

    def understood(*_):
        raise Understood

    monkeypatch.setattr(config, "Parsed", understood)
    with pytest.raises(Understood):
        plugins.load(plugins.COMMANDS, words[0]).main(words[1:])


def test_the_pages_show_commands():
    assert len(ALL) > 60


@pytest.mark.parametrize("words", ALL)
def test_a_command_that_is_shown_parses(words, reader, monkeypatch):
    if words[0].startswith("-"):
        assert cli.main(words) == 0
    else:
        parse(words, monkeypatch)


def test_a_command_that_is_wrong_does_not_parse(reader, monkeypatch):
    for line in ("pretrain --proxy simclr --simclr.nothing 1", "knn runs/simclr --neighbors 3", "prepare"):
        with pytest.raises(Exception, match=r"ssl3d (pretrain|knn|prepare): "):
            parse(line.split(), monkeypatch)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_and_commands_that_are_named_exist(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in shown_commands(path):
        if words and words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), words
    known = plugins.names(plugins.COMMANDS)
    for name in re.findall(r"`ssl3d ([a-z][a-z-]*)", text_of(path)):
        assert name in known, name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_snippets_compile(path):
    for _, body in blocks(path, "python"):
        compile(body, str(path), "exec")
    for words in shown_commands(path):
        if words[:2] == ["python", "-c"]:
            compile(words[2], str(path), "exec")


RUNNING = [
    pytest.param(body, id=f"{path.relative_to(ROOT)}:{number}")
    for path in PAGES
    for number, (mark, body) in enumerate(blocks(path, "python"))
    if mark == "runs"
]


def small(body):
    return re.sub(r"phantoms:\d+", "phantoms:14", body)


@pytest.mark.parametrize("body", RUNNING)
def test_a_snippet_that_is_marked_so_runs(body, reader):
    exec(compile(small(body), "snippet", "exec"), {"__name__": "snippet"})


def test_the_encoder_that_is_shown_keeps_the_contract(reader):
    from ssl3d.testing import check_encoder

    check_encoder("small.py")


@pytest.mark.long
def test_the_tutorial_runs(reader):
    """All of it but the section on scans of one's own, with few steps and few people."""
    shutil.rmtree(reader / "runs")
    page = text_of(TUTORIAL).partition("## With scans of your own")[0]
    done = []
    for fence in FENCE.finditer(page):
        if fence["kind"] == "python":
            exec(compile(small(fence["body"]), "make_scans.py", "exec"), {"__name__": "make_scans"})
        for line in prompts(fence["body"]) if fence["kind"] == "console" else ():
            program, *words = shlex.split(line)
            if program == "ssl3d":
                kind = "report" if "report" in words else words[0]
                assert not cli.main([*words, *SMALL.get(kind, "").split()]), line
                done.append(kind)
    assert done == ["prepare", "info", "pretrain", "linear-probe", "finetune", "report"]
    assert (reader / "report" / "index.html").is_file()
    assert list((reader / "tuned" / "predictions").rglob("*.nii.gz"))
    later = [body for path in PAGES for mark, body in blocks(path, "python") if mark == AFTERWARDS]
    assert later
    for body in later:
        exec(compile(body, "snippet", "exec"), {"__name__": "snippet"})


# Generated pages and links ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The generated pages, made as the build makes them."""
    docs = tmp_path_factory.mktemp("site") / "docs"
    write_pages(docs, ROOT)
    return docs


LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?!https?:|mailto:|#)([^)\s#]+)")


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(path, site):
    """Those of the pages to what is there or will be; those of other files to what is committed."""
    prose = FENCE.sub("", text_of(path))
    for link in LINK.findall(prose):
        target = Path(os.path.normpath(path.parent / link))
        inside = target.is_relative_to(DOCS)
        if path.is_relative_to(DOCS):
            assert inside, f"{link}: the site is without it"
            there = site / target.relative_to(DOCS) if is_generated(DOCS, target) else target
            assert there.exists(), link
        else:
            assert target.exists(), link
            assert not (inside and is_generated(DOCS, target)), f"{link}: only a build makes it"


@pytest.mark.parametrize("name", plugins.names(plugins.COMMANDS))
def test_every_option_of_a_command_is_on_its_page(name, site, capsys):
    page = (site / "reference" / "commands" / f"{name}.md").read_text(encoding="utf-8")
    words = {"leaderboard": [["run"], ["report"]], "zoo": [["list"], ["pack"]]}.get(name, [[]])
    for more in words:
        with pytest.raises(SystemExit):
            cli.main([name, *more, "--help-all"])
        printed = re.findall(r"^  (--[\w.-]+)", capsys.readouterr().out, re.MULTILINE)
        # Those of plugins have pages of their own; those of every command stand above the list of pages.
        common = {"--help", "--config", "--print_config", "--max-memory"}
        own = {flag for flag in printed if "." not in flag} - common
        assert own or name in ("proxies", "encoders")
        assert not own - set(re.findall(r"^```{option} (--[\w-]+)", page, re.MULTILINE))


def test_every_plugin_has_a_page(site):
    for group in (plugins.PROXIES, plugins.ENCODERS, plugins.BENCHMARKS):
        folder = site / "reference" / group.removeprefix("ssl3d.")
        assert {page.stem for page in folder.glob("*.md")} == {*plugins.names(group), "index"}
    told = (site / "explanation" / "proxies.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)", told, re.MULTILINE) == plugins.names(plugins.PROXIES)


def test_the_options_of_a_proxy_are_on_its_page(site):
    page = (site / "reference" / "proxies" / "sorting.md").read_text(encoding="utf-8")
    assert "```{option} --sorting.relaxation <softsort | neuralsort | odd_even | pairwise>" in page
    assert "--sorting.crop <2 whole numbers>" in page


def test_every_public_name_is_on_a_page(site):
    from ssl3d import api

    told = "".join(
        page.read_text(encoding="utf-8") for page in (site / "reference/python").glob("api-*.md")
    )
    names = {name for name in dir(api) if callable(getattr(api, name))}  # modules have entries of their own
    assert not {name for name in names if not re.search(rf"ssl3d\.api\.{name}$", told, re.MULTILINE)}


def test_what_git_ignores_is_what_is_generated():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {line.removeprefix("/docs/").rstrip("/") for line in ignored if line.startswith("/docs/")} == {
        *GENERATED,
        "_build",
    }


def test_a_second_build_writes_nothing_and_removes_what_is_stale(site):
    stale = site / "reference" / "proxies" / "gone.md"
    stale.write_text("# gone\n")
    before = {page: page.stat().st_mtime_ns for page in site.rglob("*") if page.is_file()}
    write_pages(site, ROOT)
    assert not stale.exists()
    assert {page: page.stat().st_mtime_ns for page in site.rglob("*") if page.is_file()} == {
        page: time for page, time in before.items() if page != stale
    }
