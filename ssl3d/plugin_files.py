"""Plugins in Python files that no package installs: each is a module that any process can import.

Such a module is called `ssl3d.plugin_files.PATH@DIGEST`. Path and digest of the content lie in the name, so
that a class unpickles in another process (a worker that was spawned) without anything being told to it, and
only from the very bytes that it was pickled from.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from urllib.parse import unquote

from ssl3d.errors import PluginError
from ssl3d.files import check_regular

__path__: list[str] = []  # makes this module the parent of those that the finder below finds

_PREFIX = f"{__name__}."
_DIGITS = 16  # of the digest, in a module's name


def load_file(path: Path, title: str) -> ModuleType:
    """Import a file, once for each content that it has had.

    Args:
        path: Path of the file.
        title: Beginning of the message of an error.

    Raises:
        PluginError: The file cannot be read, or fails while it is imported; the message names the line.
    """
    path = path.expanduser().resolve()
    try:
        check_regular(path)
        content = path.read_bytes()
    except OSError as error:
        raise PluginError(f"{title}: {error.strerror}") from error
    # No dot may be left in it: dots part the names of modules.
    place = str(path).replace("%", "%25").replace(".", "%2E")
    try:
        return importlib.import_module(f"{_PREFIX}{place}@{content_digest(content)[:_DIGITS]}")
    except (Exception, SystemExit) as error:
        raise PluginError(f"{title}: {what_failed(error, path)}") from error


def content_digest(content: bytes) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


def code_digest(content: bytes) -> str:
    """Return the SHA-256 of what a file computes: its syntax tree without comments, layout and docstrings.

    Example:
        >>> code_digest(b"x = 1  # one") == code_digest(b"x  =  1")
        True
    """
    tree = ast.parse(content)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return content_digest(ast.dump(tree).encode())


def what_failed(error: BaseException, path: Path | None = None) -> str:
    """Say in one line why a module could not be imported, with the line of its file.

    Args:
        error: Error that was raised.
        path: Path of the file, where the reader knows it already; only its own lines are named then.
    """
    if isinstance(error, SyntaxError):
        return f"{_place(error.filename, error.lineno, path)}{type(error).__name__}: {error.msg}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if (not frame.filename.startswith("<frozen") if path is None else frame.filename == str(path))
    ]
    # Where no file is named, the first frames are the toolkit's, which asked for the module.
    if path is None:
        frames = [frame for frame in frames if "importlib" not in frame.filename][1:]
    where = _place(frames[-1].filename, frames[-1].lineno, path) if frames else ""
    return f"{where}{type(error).__name__}: {error}"


def _place(file: str | None, line: int | None, path: Path | None) -> str:
    return f"line {line}: " if file == str(path) else f"{file}, line {line}: "


class _Loader(SourceFileLoader):
    """Loader that compiles the file itself: bytecode beside it may be of an older content."""

    def get_code(self, fullname: str) -> CodeType:
        content = self.get_data(self.path)
        if not fullname.endswith(f"@{content_digest(content)[:_DIGITS]}"):
            raise ImportError(f"{self.path} has changed since another process read it")
        code: CodeType = self.source_to_code(content, self.path)
        return code


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX) or "@" not in fullname:
            return None
        file = unquote(fullname.removeprefix(_PREFIX).rpartition("@")[0])
        return spec_from_file_location(fullname, file, loader=_Loader(fullname, file))


sys.meta_path.append(_Finder())
