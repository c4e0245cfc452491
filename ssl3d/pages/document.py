"""The frame of a page: one file of HTML that loads nothing, works without scripts and in the dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from ssl3d.amounts import printable

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a page may load: pictures that are in it. Its own script is added by digest, so no other runs."""


def document(title: str, body: str, styles: Sequence[str] = (), scripts: Sequence[str] = ()) -> str:
    """Return a whole page with the shared style and script, and those of its kind after them.

    Args:
        title: Title of the page, as text.
        body: Content of the page, as HTML; what cannot be printed is escaped in it.
        styles: Style sheets beside the shared one.
        scripts: Scripts beside the shared one.
    """
    body = "\n".join(map(printable, body.split("\n")))
    style = "\n".join([beside(__package__, "page.css"), *styles])
    script = "\n".join([beside(__package__, "page.js"), *scripts])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(printable(title))}</title>'
        f"<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main><script>{script}</script></body></html>\n"
    )


def beside(package: str, name: str) -> str:
    """Read a file that lies in a package, such as the style of a page."""
    return (files(package) / name).read_text(encoding="utf-8")
