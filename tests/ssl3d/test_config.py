import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.command_help import HelpSection
from ssl3d.config import Plugins, added_option, as_before, from_dict, parse, to_dict
from ssl3d.errors import PluginError, UsageError
from ssl3d.yaml_files import parse_yaml


@dataclass
class Options:
    """Does a thing.

    Attributes:
        data: Where the scans are.
        batch_size: Volumes a step.
    """

    data: tuple[str, ...]
    proxy: tuple[str, ...] = ("sorting",)
    encoder: str = "resnet18"
    batch_size: int = 8
    lr: float | None = None
    spacing: tuple[float, float, float] | str = "median"
    voxel: tuple[float, float, float] | Literal["keep"] = "keep"
    overwrite: bool = False
    devices: int | str = "auto"
    fractions: tuple[float, ...] = (1.0,)
    out: Path | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")


@dataclass
class Section:
    """Attributes:
    slices: How many.
    """

    slices: int = 8
    min_gap: float = 2.0
    kind: str = "acs"
    strides: tuple[int, int, int] = (2, 2, 2)


def section(name):
    if name not in ("sorting", "simclr", "resnet18", "resnet10"):
        raise PluginError(f"unknown {name!r}")
    return Section


PLUGINS = Plugins(
    {"proxy": section, "encoder": section},
    {"proxy": ["sorting", "simclr"], "encoder": ["resnet10", "resnet18"]},
)


def run(*argv):
    return parse("ssl3d thing", Options, argv, PLUGINS)


def test_dashes_and_underscores_are_the_same_flag():
    assert run("--data", "a", "--batch-size", "3").options == run("--data=a", "--batch_size=3").options


def test_several_words_make_a_tuple():
    parsed = run("--data", "a b", "c", "--spacing", "1", "1", "2.5", "--fractions", "0.05", "1")
    assert parsed.options.data == ("a b", "c")
    assert parsed.options.spacing == (1.0, 1.0, 2.5)
    assert parsed.options.fractions == (0.05, 1.0)


@given(
    st.lists(
        st.text(st.characters(codec="ascii"), min_size=1).filter(lambda s: s[0] not in "-["), min_size=1
    )
)
@settings(max_examples=40, deadline=None)
def test_any_words_survive_as_a_sequence_of_texts(words):
    assert run("--data", *words).options.data == tuple(words)


def test_a_word_is_kept_where_a_triple_or_a_word_may_stand():
    assert run("--data", "a", "--spacing", "keep").options.spacing == "keep"
    assert run("--data", "a", "--devices", "2").options.devices == 2
    assert run("--data", "a", "--devices", "auto").options.devices == "auto"


def test_a_flag_alone_is_true_and_numbers_in_e_notation_are_floats():
    options = run("--data", "a", "--overwrite", "--lr", "1e-3").options
    assert options.overwrite is True
    assert options.lr == 0.001


def test_selected_plugins_get_sections_with_their_flags():
    parsed = run(
        "--data",
        "a",
        "--proxy",
        "sorting",
        "simclr",
        "--simclr.min-gap",
        "3",
        "--resnet18.strides",
        "1",
        "2",
        "2",
    )
    assert set(parsed.sections) == {"sorting", "simclr", "resnet18"}
    assert parsed.sections["simclr"].min_gap == 3.0
    assert parsed.sections["sorting"].min_gap == 2.0
    assert parsed.sections["resnet18"].strides == (1, 2, 2)


def test_flags_override_the_file_wherever_config_stands(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "proxy: simclr\nbatch_size: 3\nspacing: [1, 1, 2]\nsimclr:\n  slices: 4\n", encoding="utf-8"
    )
    parsed = run("--data", "a", "--batch-size", "5", "--config", str(file))
    assert parsed.options.batch_size == 5
    assert parsed.options.proxy == ("simclr",)
    assert parsed.options.spacing == (1.0, 1.0, 2.0)
    assert parsed.sections["simclr"].slices == 4
    assert {"proxy", "spacing", "batch_size", "data", "simclr.slices"} == parsed.given


def test_a_section_of_a_plugin_that_is_not_selected_is_told(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("proxy: sorting\nsimclr:\n  slices: 4\n", encoding="utf-8")
    assert set(run("--data", "a", "--config", str(file)).sections) == {"sorting", "resnet18"}
    assert capsys.readouterr().err == (
        f"ssl3d thing: {file}: simclr is not selected, so its section is not used\n"
    )
    silent = dataclasses.replace(PLUGINS, silent=[str(file)])
    parse("ssl3d thing", Options, ["--data", "a", "--config", str(file)], silent)
    assert capsys.readouterr().err == ""


def test_what_print_config_prints_can_be_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--data", "a", "--encoder", "resnet10", "--resnet10.kind", "3d", "--print_config")
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    parsed = run("--config", str(file))
    assert parsed.sections["resnet10"].kind == "3d"
    assert parsed.options.data == ("a",)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data", "a", "--batch-size", "0"], "--batch-size: batch_size must be at least 1, not 0"),
        (["--data", "a", "--batch-size", "x"], "--batch-size"),
        (["--data", "a", "--sorting.slicez", "3"], "--sorting.slicez"),
        (["--batch-size", "3"], "data"),
        (["--data", "a", "--config", "/nowhere.yaml"], "--config /nowhere.yaml"),
        (["--data", "a", "--config"], "--config: names no file"),
        (["--data", "a", "--proxy", "sortin"], "sortin"),
        (
            ["--data", "a", "--simclr.slices", "4"],
            "--simclr.slices: simclr is not selected; name it with --proxy",
        ),
        (["--data", "a", "--sorting.slice", "4"], "--sorting.slice"),
        (["--data", "a", "--batch", "4"], "--batch"),
        (["--data", "a", "--batch-size", "many"], "expected a whole number, got many"),
        (
            ["--data", "a", "--voxel", "1", "1"],
            "--voxel: expected one of tuple[float, float, float], 'keep', got",
        ),
    ],
)
def test_wrong_input_gives_one_line_that_names_the_flag(argv, said):
    with pytest.raises((UsageError, PluginError)) as error:
        run(*argv)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_words_that_may_be_left_out_are_not_called_required(capsys):
    @dataclass
    class Listed:
        """List things.

        Attributes:
            which: Names; all if left out.
        """

        which: tuple[str, ...] = field(default=(), metadata={"positional": True})

    assert parse("list", Listed, []).options.which == ()
    assert parse("list", Listed, ["a", "b"]).options.which == ("a", "b")
    with pytest.raises(SystemExit):
        parse("list", Listed, ["--help"])
    assert "required" not in capsys.readouterr().out


def test_a_broken_configuration_file_is_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("a: [1,", encoding="utf-8")
    with pytest.raises(UsageError, match=r"c\.yaml: not YAML"):
        run("--data", "a", "--config", str(file))
    file.write_text("- a\n", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no options"):
        run("--data", "a", "--config", str(file))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_sise: 3", "unknown option batch_sise; near it: batch_size"),
        ("sorting: {slicez: 3}", "unknown option sorting.slicez; near it: sorting.slices"),
        ("sorting: {crop: 3}", "unknown option sorting.crop; sorting has slices, min_gap, kind, strides"),
        ("nonsense: 3", "unknown option nonsense; --help lists the options"),
        ("batch_size: many", "batch_size: expected a whole number, got many"),
        ("sorting: {slices: many}", "sorting.slices: expected a whole number, got many"),
        ("batch_size: 3\nbatch_size: 4", "'batch_size' is given twice"),
    ],
)
def test_an_error_in_a_configuration_file_names_the_file(tmp_path, text, said):
    file = tmp_path / "a, c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=f"{re.escape(str(file))}: .*{re.escape(said)}"):
        run("--data", "a", "--config", str(file))


def test_print_config_leaves_out_defaults_when_asked(capsys):
    words = [
        "--data",
        "a",
        "--batch-size",
        "8",
        "--simclr.slices",
        "4",
        "--proxy",
        "simclr",
        "--lr",
        "1e-5",
    ]
    for flag in (["--print_config=skip_default"], ["--print_config", "skip_default,skip_null"]):
        with pytest.raises(SystemExit):
            run(*words, *flag)
        printed = parse_yaml(capsys.readouterr().out)
        assert printed == {"data": ["a"], "proxy": ["simclr"], "lr": 1e-5, "simclr": {"slices": 4}}
    with pytest.raises(SystemExit):
        run("--data", "a", "--print_config=skip_null")
    printed = parse_yaml(capsys.readouterr().out)
    assert "lr" not in printed and printed["batch_size"] == 8


@dataclass
class Ways:
    """Compute on a device."""

    device: str = "auto"


def test_former_names_and_values_are_read(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("accelerator: gpu\n", encoding="utf-8")
    for words in (["--accelerator", "gpu"], ["--device=gpu"], ["--config", str(file)]):
        parsed = parse("ssl3d thing", Ways, words)
        assert parsed.options == Ways("cuda") and parsed.given == {"device"}
    assert from_dict(Ways, {"accelerator": "cpu"}, "file") == Ways("cpu")
    with pytest.raises(UsageError, match="unknown option accelerator"):  # where there is no device
        from_dict(Options, {"data": ["a"], "accelerator": "cpu"}, "file")


@dataclass
class Sectioned:
    """Do a thing in sections.

    Attributes:
        which: Names of things.
        size: Size of the crop, D H W.
        often: Whether to do it often.
        seldom: Number that is seldom wanted.
        other: Word that no section lists.
    """

    which: tuple[str, ...] = field(metadata={"positional": True})
    size: tuple[int, int, int] = (1, 2, 3)
    often: bool = False
    seldom: float | None = None
    other: str = "x"

    help_sections = (HelpSection("crops", ("often", "size"), ("seldom",)),)


def test_help_shows_sections_and_what_is_rare_only_when_asked(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("ssl3d thing", Sectioned, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ssl3d thing WHICH ... [options]\n\nDo a thing in sections.\n")
    crops = shown[shown.index("crops:") : shown.index("more options:")]
    assert (
        crops.index("--often ") < crops.index("--size <3 whole numbers>") < crops.index("(default: 1 2 3)")
    )
    assert "--other <text>" in shown and "--seldom" not in shown
    assert "ssl3d thing --help-all lists 1 more options" in shown
    with pytest.raises(SystemExit):
        parse("ssl3d thing", Sectioned, ["--help-all"])
    shown = capsys.readouterr().out
    assert "--seldom <number>" in shown and "more options." not in shown
    assert "tuple" not in shown and max(map(len, shown.splitlines())) <= 100


def test_help_asks_for_no_plugin_that_is_not_named(capsys):
    def refuse(name):
        raise AssertionError(name)

    unread = Plugins({"proxy": refuse, "encoder": refuse}, PLUGINS.known)
    with pytest.raises(SystemExit):
        parse("ssl3d thing", Options, ["--help"], unread)
    assert "options of" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse("ssl3d thing", Options, ["--encoder", "resnet10", "--help"], PLUGINS)
    shown = capsys.readouterr().out
    assert "options of resnet10:" in shown and "options of sorting:" not in shown


def test_dataclasses_round_trip_through_plain_values():
    options = Options(("a",), out=Path("x"), spacing=(1.0, 2.0, 3.0))
    assert from_dict(Options, to_dict(options), "file") == options
    with pytest.raises(UsageError, match="file: unknown option nonsense"):
        from_dict(Options, {"data": ["a"], "nonsense": 1}, "file")
    for odd in (1.5, "words", None, ["a"]):
        with pytest.raises(UsageError, match=r"file: .*; expected options by name"):
            from_dict(Options, odd, "file")


@dataclass
class Grown:
    """Options, of which one came later.

    Attributes:
        width: Width of the thing.
        rings: Rings around it.
    """

    width: int = 3
    rings: str = added_option("published", before="none")


def test_an_option_that_a_record_lacks_means_what_it_meant_before():
    assert as_before(Grown) == {"rings": "none"}
    assert from_dict(Grown, {"width": 4}, "a run", recorded=True) == Grown(4, "none")
    assert from_dict(Grown, {"width": 4, "rings": "two"}, "a run", recorded=True) == Grown(4, "two")
    assert from_dict(Grown, {"width": 4}, "a user's words") == Grown(4, "published")


@pytest.mark.parametrize(
    ("section", "rings"),
    [
        ({"width": 4}, "none"),  # all that there was
        ({"width": 4, "rings": "two"}, "two"),
        ({}, "published"),  # what a user writes
    ],
)
def test_a_configuration_file_of_before_keeps_its_meaning(section, rings, tmp_path):
    @dataclass
    class Choice:
        """Options.

        Attributes:
            kind: Kind of the thing.
        """

        kind: str = "grown"

    named = Plugins({"kind": lambda name: Grown}, {"kind": ["grown"]})
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"kind": "grown", "grown": section}), encoding="utf-8"
    )
    parsed = parse("test", Choice, ["--config", str(tmp_path / "run.yaml")], named)
    assert parsed.sections["grown"].rings == rings
    parsed = parse("test", Choice, ["--config", str(tmp_path / "run.yaml"), "--grown.rings", "five"], named)
    assert parsed.sections["grown"].rings == "five"


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--batch-sizes=3", "near it: --batch-size"),
        ("--sorting.slice=3", "near it: --sorting.slices"),
        ("--sorting.crop=3", "sorting has slices, min-gap, kind, strides"),
        ("--quite-another=3", "--help lists the options"),
        ("--nothing.such=3", "--help lists the options"),
    ],
)
def test_an_unknown_flag_says_what_is_near(flag, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        run("--data", "a", flag)


@dataclass
class Kinds:
    """Options of every plain kind.

    Attributes:
        count: Whole number.
        rate: Number.
        words: Words.
        sides: Three numbers, or none.
        way: One of two ways.
        place: Folder.
        on: Switch.
    """

    count: int = 1
    rate: float = 0.5
    words: tuple[str, ...] = ()
    sides: tuple[int, int, int] | None = None
    way: Literal["up", "down"] = "up"
    place: Path | None = None
    on: bool = False


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "x"), ("count", 1.5), ("count", None), ("rate", "1e-3"), ("rate", []), ("rate", 10**400),
        ("words", "word"), ("words", [True]), ("words", [["a"]]), ("words", 7), ("sides", [1, 2]),
        ("sides", ["a"] * 3), ("sides", 3), ("way", "left"), ("way", []), ("way", {}), ("place", 3),
        ("on", 1), ("on", "no"), (7, 1),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_one_line(key, value):
    with pytest.raises(UsageError, match=r"^file: ") as caught:
        from_dict(Kinds, {"count": 2, key: value}, "file")
    assert "\n" not in str(caught.value) and str(key) in str(caught.value)


def test_values_of_the_right_kind_are_taken():
    given = {
        "count": 3,
        "rate": 1,
        "words": ["a", "b"],
        "sides": [1, 2, 3],
        "way": "down",
        "place": "x",
        "on": True,
    }
    assert from_dict(Kinds, given, "file") == Kinds(3, 1.0, ("a", "b"), (1, 2, 3), "down", Path("x"), True)
