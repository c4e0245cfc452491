"""A page for each command, with every option."""

from generate.options import Asked, Group, ask, subcommands, usage
from generate.pages import Pages, prose, toctree
from ssl3d import plugins

TASKS = ("classification", "segmentation", "detection")
"""Values of `ssl3d finetune --task`, each with options of its own."""

_SECTIONS = {
    "pretrain": (
        "The options of each proxy are on the pages of the [proxies](../proxies/index.md), those of each "
        "encoder on the pages of the [encoders](../encoders/index.md). They are given to this command as "
        "in `--sorting.slices 8` and `--resnet18.kind 3d`."
    ),
}

_COMMON = """Every command also takes `--config FILE.yaml`, a file of options that stands below the flags;
`--print_config`, which prints the options that would be used, in the form of such a file
(`--print_config=skip_default` without those at their defaults); `--help`, which shows the options that are
used most; `--help-all`, which shows every option; and `--max-memory 8GB`, the memory that may be taken at
once for scans, volumes and files, by default `$SSL3D_MAX_MEMORY`, else half of what is free. In flags,
dashes and underscores mean the same. An option of several values takes them as several words, as in
`--fractions 0.1 1`.
"""


def write(pages: Pages) -> None:
    """Writes a page for each command, and their list."""
    loaded, failed = plugins.load_all(plugins.COMMANDS)
    if failed:
        raise next(iter(failed.values()))
    rows = []
    for name, command in loaded.items():
        pages.write(f"reference/commands/{name}.md", _page(name, command.summary))
        rows.append(f"| [`ssl3d {name}`]({name}.md) | {prose(command.summary)} |")
    table = "| command | what it does |\n|---|---|\n" + "\n".join(rows)
    pages.write(
        "reference/commands/index.md",
        f"# Commands\n\n{table}\n\n{_COMMON}\n" + toctree(loaded, hidden=True),
    )


def _page(name: str, summary: str) -> str:
    asked = ask(name)
    if asked is None:
        parts = [f"# ssl3d {name}\n", f"```text\n{usage(name).strip()}\n```\n"]
        for word in subcommands(name):
            below = ask(name, word)
            assert below is not None, f"ssl3d {name} {word} has no options"
            parts += [f"## ssl3d {name} {word}\n", *_body(f"ssl3d {name} {word}", below)]
        return "\n".join(parts)
    parts = [f"# ssl3d {name}\n", *_body(f"ssl3d {name}", asked)]
    if name in _SECTIONS:
        parts.append(_SECTIONS[name] + "\n")
    if name == "finetune":
        for task in TASKS:
            parts += [f"## Options of {task}\n", *section(name, f"--task={task}", task)]
    return "\n".join(parts)


def section(command: str, word: str, plugin: str) -> list[str]:
    """Return the options that a plugin adds to a command, as MyST.

    Args:
        command: Name of the command.
        word: What selects the plugin, as in `--proxy=sorting`.
        plugin: Name of the plugin.
    """
    asked = ask(command, word)
    assert asked is not None
    lines = next((group.lines for group in asked.groups if group.plugin == plugin), [])
    return [f"```{{program}} ssl3d {command}\n```\n", *lines]


def _body(program: str, asked: Asked) -> list[str]:
    own: Group = next(group for group in asked.groups if not group.plugin)
    return [
        f"```{{program}} {program}\n```\n",
        prose(asked.summary) + "\n",
        *own.lines,
        prose(asked.epilog) + "\n",
    ]
