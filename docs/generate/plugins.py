"""A page for each proxy, encoder and benchmark, from its docstring and its options; tables of all."""

import dataclasses
import inspect
from typing import Any

from generate.commands import section
from generate.pages import Pages, cell, prose, toctree
from ssl3d import plugins
from ssl3d.command_help import typed

_DIFFERS = ("Differs from the paper", "Reconstructed from the abstract")
"""How the paragraph of a proxy's docstring begins that says what its paper does otherwise."""

_ASKED = "The network must work out "
"""How the docstring of a proxy begins."""
_PROXIES = """# Proxies

A proxy is named by `ssl3d pretrain --proxy`. Several names train one encoder together, as in
`--proxy sorting mae --weights 1 0.5`.
"""
_ENCODERS = """# Encoders

An encoder is named by `ssl3d pretrain --encoder`. Wherever an untrained network is wanted, it stands as
`scratch:NAME`, as in `scratch:resnet18:acs:width=32`. An encoder takes volumes of any depth D ≥ 1. Slices
go in as thin slabs, images as D = 1.

"""
_KINDS = """

## Kinds

ResNets, DenseNet-121 and MobileNetV2 come in four kinds, chosen by their option `kind`:

| kind | kernels |
|---|---|
| `3d` | full 3D kernels |
| `p3d` | 1×3×3, then 3×1×1 |
| `acs` | 2D kernels over the axial, coronal and sagittal plane, a share of the channels each |
| `2.5d` | 1×3×3 |

Kinds `acs` and `2.5d` hold exactly the weights of the 2D network, under torchvision's names, and on D = 1
they compute exactly what it computes.

"""
_PAPERS = """# Each proxy and its paper

Every proxy is written from a paper, for volumes, for small batches and for any encoder. This page says what
each does otherwise than its paper, in the words of its docstring. The
[pages of the proxies](../reference/proxies/index.md) have the rest of the docstrings and the options.

"""


def write(pages: Pages) -> None:
    """Writes the pages of the plugins that are installed, and each proxy's differences from its paper."""
    _write_proxies(pages)
    _write_encoders(pages)
    _write_benchmarks(pages)


def _write_proxies(pages: Pages) -> None:
    loaded = _loaded(plugins.PROXIES)
    rows: dict[bool, list[str]] = {False: [], True: []}
    papers = []
    for name, proxy in loaded.items():
        first, *rest = paragraphs(proxy)
        facts = [
            ("paper", cell(proxy.paper)),
            ("learns from labels", "yes" if proxy.uses_labels else "no"),
            ("metric in the progress bar", f"`{proxy.main}`"),
            ("recommended options", _recipe(proxy)),
        ]
        table = "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts)
        body = "\n\n".join(map(prose, rest))
        options = "\n".join(section("pretrain", f"--proxy={name}", name))
        pages.write(
            f"reference/proxies/{name}.md",
            f"# {name}\n\n{prose(first)}\n\n{table}\n\n{body}\n\n## Options\n\n{options}\n",
        )
        asked = cell(first.removeprefix(_ASKED).removesuffix("."))
        rows[proxy.uses_labels].append(f"| [`{name}`]({name}.md) | {asked} | {cell(proxy.paper)} |")
        papers.append(_against_paper(name, proxy, first, rest))
    parts = [_PROXIES]
    for uses_labels, title in ((False, "Without labels"), (True, "With labels")):
        head = "| proxy | the network must work out | paper |\n|---|---|---|\n"
        parts.append(f"## {title}\n\n{head}" + "\n".join(rows[uses_labels]) + "\n")
    pages.write("reference/proxies/index.md", "\n".join([*parts, toctree(loaded, hidden=True)]))
    pages.write("explanation/proxies.md", _PAPERS + "\n".join(papers))


def _against_paper(name: str, proxy: Any, first: str, rest: list[str]) -> str:
    differs = [text for text in rest if text.startswith(_DIFFERS)]
    if not differs:
        differs = [text for text in rest if "iffers from" in text]
    if not differs:
        differs = ["Its docstring names no difference from the paper."]
    body = "\n\n".join(map(prose, differs))
    return f"## {name}\n\n{prose(first)}\n\n*{prose(proxy.paper)}*\n\n{body}\n"


def _write_encoders(pages: Pages) -> None:
    loaded = _loaded(plugins.ENCODERS)
    rows = []
    for name, encoder in loaded.items():
        first, *rest = paragraphs(encoder)
        body = "\n\n".join(map(prose, rest))
        options = "\n".join(section("pretrain", f"--encoder={name}", name))
        pages.write(
            f"reference/encoders/{name}.md",
            f"# {name}\n\n{prose(first)}\n\n{prose(encoder.paper)}\n\n{body}\n\n## Options\n\n{options}\n",
        )
        rows.append(f"| [`{name}`]({name}.md) | {cell(first)} | {cell(encoder.paper)} |")
    table = "| encoder | | paper |\n|---|---|---|\n" + "\n".join(rows)
    pages.write(
        "reference/encoders/index.md",
        f"{_ENCODERS}{table}{_KINDS}" + toctree(loaded, hidden=True),
    )


def _write_benchmarks(pages: Pages) -> None:
    loaded = _loaded(plugins.BENCHMARKS)
    rows = []
    for name, benchmark in loaded.items():
        first, *rest = paragraphs(benchmark)
        scores = ", ".join(f"`{score}` for {target}" for target, score in benchmark.mains.items())
        body = "\n\n".join(map(prose, rest))
        pages.write(
            f"reference/benchmarks/{name}.md",
            f"# {name}\n\n{prose(first)}\n\n| | |\n|---|---|\n| what is measured | "
            f"{cell(benchmark.description)} |\n| protocol from | {cell(benchmark.reference)} |\n"
            f"| score that ranks | {scores} |\n| version | {benchmark.version} |\n\n{body}\n\n"
            f"Command: [`ssl3d {name}`](../commands/{name}.md).\n",
        )
        rows.append(f"| [`{name}`]({name}.md) | {cell(benchmark.description)} | {scores} |")
    table = "| benchmark | what is measured | score that ranks |\n|---|---|---|\n" + "\n".join(rows)
    pages.write(
        "reference/benchmarks/index.md", f"# Benchmarks\n\n{table}\n\n" + toctree(loaded, hidden=True)
    )


def paragraphs(plugin: Any) -> list[str]:
    """Return the paragraphs of a class's docstring, without its list of attributes."""
    text = inspect.cleandoc(plugin.__doc__ or "")
    return [part for part in text.split("\n\n") if not part.startswith("Attributes:")]


def _recipe(proxy: Any) -> str:
    """The options that a proxy recommends, and its own defaults that matter for all."""
    words = [f"`--{key.replace('_', '-')} {typed(value)}`" for key, value in proxy.recipe.items()]
    crop = next((f for f in dataclasses.fields(proxy.Config) if f.name == "crop"), None)
    if crop is not None:
        words.append(f"crop `{typed(crop.default)}`")
    return ", ".join(words) or "none"


def _loaded(group: str) -> dict[str, Any]:
    loaded, failed = plugins.load_all(group)
    if failed:
        raise next(iter(failed.values()))
    return loaded
