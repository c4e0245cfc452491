"""A page for each suite that comes with ssl3d, and for each preset of `ssl3d pretrain`."""

from importlib.resources import files
from pathlib import Path

import yaml

from generate.pages import Pages, cell, toctree

_SUITES = """# Suites

`ssl3d leaderboard run NAME` takes the name of one of these, or a YAML file of the same form
([how to write one](../../how-to/suite.md)).

| suite | |
|---|---|
"""
_PRESETS = """# Presets

`ssl3d pretrain --preset NAME` takes the options of one of these files; every flag stands above it.

"""


def write(pages: Pages) -> None:
    """Writes the pages of the suites."""
    folder = Path(str(files("ssl3d_benchmarks") / "suites"))
    names, rows = [], []
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        about = str(yaml.safe_load(text).get("description", ""))
        pages.write(f"reference/suites/{path.stem}.md", f"# {path.stem}\n\n{about}\n\n```yaml\n{text}```\n")
        names.append(path.stem)
        rows.append(f"| [`{path.stem}`]({path.stem}.md) | {cell(about)} |")
    listed = toctree([*names, "presets"], hidden=True)
    pages.write("reference/suites/index.md", _SUITES + "\n".join(rows) + f"\n\n{listed}")
    presets = Path(str(files("ssl3d") / "presets"))
    parts = [
        f"## {path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"
        for path in sorted(presets.glob("*.yaml"))
    ]
    pages.write("reference/suites/presets.md", _PRESETS + "\n".join(parts))
