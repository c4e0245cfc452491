"""Options of the command `ssl3d sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ssl3d.api import HelpSection


@dataclass(frozen=True)
class SweepOptions:
    """Search the flags of pretrain or finetune for those with the best score, by Optuna.

    Attributes:
        file: YAML file of the sweep: command, options, search, value and direction.
        out: Folder of the sweep: its journal, and the run of each trial.
        trials: Number of trials in all, those of earlier calls and other workers counted in.
        sampler: Method that proposes values: tpe (tree-structured Parzen estimators), or random.
        pruner: Method that stops trials early: median stops one below the median of the others at the same
            step, hyperband gives many trials few steps and few trials many, none stops none.
        startup: Number of trials that are neither proposed from scores nor stopped early.
        seed: Seed of the sampler.
        verbose: Whether the output of the trials is shown.
    """

    file: Path = field(metadata={"positional": True})
    out: Path = Path("sweep")
    trials: int = 20
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    startup: int = 5
    seed: int = 0
    verbose: bool = False

    help_sections: ClassVar[tuple[HelpSection, ...]] = (
        HelpSection("search", ("trials", "out"), ("sampler", "pruner", "startup", "seed")),
        HelpSection("output", ("verbose",)),
    )
    """Sections of the help."""

    def __post_init__(self) -> None:
        """Check the value of every field."""
        if self.trials < 1:
            raise ValueError(f"trials: {self.trials} must be at least 1")
        if self.startup < 0:
            raise ValueError(f"startup: {self.startup} must be 0 or more")
