"""The command `ssl3d finetune`: encoders trained on a downstream task, beside networks from scratch."""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.api import Plugins, parse
from ssl3d_benchmarks.finetune.options import FinetuneOptions

summary = "train encoders on classes, masks or boxes, beside the same network from scratch"

EPILOG = """The recipe of the task sets the defaults of the training; a preset goes above the recipe, and a
flag above both. Nothing is computed twice: a record is found again by all that decides its scores, and a
job that was killed goes on from its last checkpoint."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 1 where a job failed."""
    from ssl3d_benchmarks.finetune.protocol import TASKS, task_class

    parsed = parse(
        "ssl3d finetune",
        FinetuneOptions,
        argv,
        Plugins({"task": lambda name: task_class(name).Config}, {"task": tuple(TASKS)}),
        EPILOG,
    )
    from ssl3d_benchmarks.finetune.recipe import resolve
    from ssl3d_benchmarks.finetune.run import run

    options, config = resolve(parsed.options, parsed.sections[parsed.options.task], parsed.given)
    return 1 if run(options, config).failed else 0
