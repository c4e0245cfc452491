"""The rules of wording that a machine can check: summaries, descriptions of fields, names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted(
    {
        path.parent.relative_to(ROOT).as_posix()
        for folder in ("ssl3d", "proxies", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
)
LEFT = set(
    """
    """.split()  # noqa: SIM905
)
"""Rooms that were not read again yet."""

EMPTY_NAMES = {"found", "one", "told", "made", "what"}
"""Names that tell a reader nothing, of variables and arguments alike."""
VAGUE_CLASSES = {"Options", "Plan", "Task"}
"""Names of classes that need a word before them: FinetuneOptions, TrainingPlan."""
OPENINGS = re.compile(r"(Of|That of|Those|See|Any|How|As|Such)\b")
"""How the description of a field may not open: it stands alone in the help."""
VERBS = set(
    """
    accept adapt add adjust advance aggregate align allow answer append apply arrange ask assemble
    assign attach attend augment average balance begin blend blur bound bring broadcast build cache
    call carry change check choose clamp clear clip close cluster collect combine compare compose
    compress compute configure confirm continue convert convolve copy correct corrupt count crop cut
    deal decide declare decode decorrelate deform describe detach detect divide do download draw
    drop embed encode end enlarge enter erase estimate evaluate exchange exclude expand explain
    export extract fetch fill filter find finish fit flag flip flush fold follow force format
    forward freeze fuse gather generate give group guess halve hand hash hold ignore import infer
    inflate inform initialise insert integrate interpolate invert iterate join judge keep label lay
    leave lengthen let limit link list load locate lock log look lower make map mark mask match
    measure merge mirror mix move multiply name normalise note number offer omit open order pack pad
    paint pair parse pass perform permute pick place plan plot point pool position predict prefetch
    prepare present preserve pretrain print process produce project propose protect prove pull push
    put quantise raise rank read rebuild recalibrate recognise record recover reduce refresh refuse
    register reject release remark remember remove rename render reorder repeat replace report
    request require resample rescale reseed reset reshape resize resolve restore restrict resume
    retry return reverse rewrite rotate round route run sample save say scale scan scatter score
    search seed select send separate serve set settle shape share shift show shrink shuffle sign
    simulate size skip slice smooth solve sort split stack standardise start stop store stretch
    strip subtract suggest sum summarise supply swap sync take teach tell test tie tile time trace
    track train transform translate treat trim try tune turn undo unfold unpack update upsample use
    validate verify vote wait walk warn weigh weight wrap write yield zoom
    """.split()  # noqa: SIM905
)
"""Verbs in the imperative with which a summary may begin; add to them what is missing."""


def functions(room):
    for path in sorted((ROOT / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield path.relative_to(ROOT), node


def summary_of(node):
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


def is_property(node):
    return any("property" in ast.unparse(one) for one in getattr(node, "decorator_list", ()))


def rooms():
    return [pytest.param(room, id=room) for room in ROOMS if room not in LEFT]


@pytest.mark.parametrize("room", rooms())
def test_summaries_are_sentences(room):
    wrong = []
    for path, node in functions(room):
        summary = summary_of(node)
        if not summary or node.name.startswith("__"):
            continue
        if len(summary.split()) < 4:
            wrong.append(f"{path}:{node.lineno}: {node.name}: {summary!r} has fewer than four words")
        first = re.sub(r"\W+$", "", summary.split()[0]).lower()
        if not isinstance(node, ast.ClassDef) and not is_property(node) and first not in VERBS:
            wrong.append(f"{path}:{node.lineno}: {node.name}: {summary!r} does not begin with a verb")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", rooms())
def test_descriptions_of_fields_stand_alone(room):
    wrong = []
    for path, node in functions(room):
        section = ""
        for line in (ast.get_docstring(node) or "").split("\n"):
            heading = re.match(r"(Args|Attributes|Returns|Raises|Example|Examples|Note):$", line)
            section = heading[1] if heading else section
            field = re.match(r"    (\w+): (.*)", line)
            if section in ("Args", "Attributes") and field and OPENINGS.match(field[2]):
                wrong.append(f"{path}:{node.lineno}: {node.name}: {field[1]}: {field[2]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", rooms())
def test_names_say_what_they_name(room):
    wrong = []
    for path in sorted((ROOT / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.ClassDef) and node.name in VAGUE_CLASSES:
                wrong.append(f"{path}:{node.lineno}: class {node.name}")
            if name in EMPTY_NAMES:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong, "\n".join(wrong)
