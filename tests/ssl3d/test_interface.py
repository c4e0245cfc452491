"""The public interface: what the stubs list is there, is listed once, and is what type checkers see."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import ssl3d
import ssl3d.api

ROOT = Path(ssl3d.__file__).parent
STUBS = {
    ".".join(["ssl3d", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.pyi"))
}
FOLDERS = {"api", "convert", "evaluation", "testing"}


def listed(stub):
    """Every name of a stub: (name, name it is known by, module it comes from)."""
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.name, alias.asname, node


def home_of(module, stub, node):
    """The module that a relative import of a stub names."""
    package = module if stub.name == "__init__.pyi" else module.rpartition(".")[0]
    assert node.level == 1, f"{stub}: line {node.lineno}: not a relative import of one dot"
    return f"{package}.{node.module}" if node.module else package


@pytest.mark.parametrize("module", STUBS)
def test_every_name_of_a_stub_imports(module):
    loaded, stub = importlib.import_module(module), STUBS[module]
    names = []
    for name, known_by, node in listed(stub):
        assert name == known_by, f"{stub}: line {node.lineno}: `{name} as {name}` exports to type checkers"
        home = home_of(module, stub, node)
        expected = (
            getattr(importlib.import_module(home), name)
            if node.module
            else importlib.import_module(f"{home}.{name}")
        )
        assert getattr(loaded, name) is expected
        names.append(name)
    assert len(set(names)) == len(names), f"{stub}: a name stands there twice"
    assert sorted(loaded.__all__) == sorted(names)
    assert set(names) <= set(dir(loaded))


@pytest.mark.parametrize("module", STUBS)
def test_stubs_take_names_from_where_they_are_defined(module):
    for name, _, node in listed(STUBS[module]):
        found = getattr(importlib.import_module(module), name)
        if inspect.isclass(found) or inspect.isfunction(found):
            home = home_of(module, STUBS[module], node)
            assert found.__module__ == home, (
                f"{module}: {name} is defined in {found.__module__}, not {home}"
            )


def test_the_first_names_of_the_package():
    functions = {"encoder_from", "load_encoder", "load_model", "load_proxies", "pretrain", "resume"}
    functions |= {"convert_encoder", "embed", "finetune", "localize", "prepare"}
    assert set(ssl3d.__all__) == functions | FOLDERS
    assert all(callable(getattr(ssl3d, name)) for name in functions)
    for name in FOLDERS:
        assert getattr(ssl3d, name) is importlib.import_module(f"ssl3d.{name}")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        ssl3d.api.no_such_thing  # noqa: B018


@pytest.mark.parametrize("room", ["", "checkpoint", "commands", "testing", "training"])
def test_private_names_stay_in_their_modules(room):
    for path in sorted((ROOT / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssl3d"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path}: imports {', '.join(private)} from {node.module}"
