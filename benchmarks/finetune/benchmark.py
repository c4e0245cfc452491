"""Fine-tuning as a benchmark like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ssl3d.api import Benchmark, Scores
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.protocol import Array, FinetuneTask

if TYPE_CHECKING:
    from ssl3d.api import Collection, Contestant, Encoder, Model, statistics


class Finetune(Benchmark):
    """Fine-tuning as a benchmark: an encoder trained on a downstream task, scored by the task.

    Its recipe of training is that of `ssl3d finetune`.
    """

    Config: ClassVar[type] = FinetuneOptions
    name = "finetune"
    version = 1
    description = "an encoder trained further on classes, masks or boxes, and from scratch"
    reference = (
        "learning rates of their own for the scratch arm: Chen, Ma, Zheng: Med3D, arXiv 1904.00625; "
        "equal effort: He, Girshick, Dollar: Rethinking ImageNet Pre-training, ICCV 2019, arXiv 1811.08883"
    )
    mains: ClassVar[Mapping[str, str]] = {
        "classes": "auc", "ordinal": "spearman", "real": "r2", "masks": "dice", "boxes": "cpm"
    }  # fmt: skip

    def __init__(self, downstream: FinetuneTask) -> None:
        """Take the downstream task, which knows its data."""
        super().__init__(downstream.config)
        self.downstream = downstream
        self.target = downstream.target

    @property
    def main(self) -> str:
        """Name of the score that ranks contestants and chooses steps."""
        return self.downstream.mains[self.target]

    @property
    def task(self) -> str:
        """Name of the task in records, `finetune-NAME/TARGET`."""
        return f"{self.name}-{self.downstream.name}/{self.target}"

    @property
    def task_version(self) -> int:
        """Version of frame and task together: either changes the scores."""
        return 100 * self.version + self.downstream.version

    @classmethod
    def restore(cls, encoder: Encoder, card: dict[str, Any]) -> Model:
        """Build a model that was kept, with new weights."""
        from ssl3d_benchmarks.finetune.kept import restore

        return restore(encoder, card)

    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, statistics.Statistic]]:
        """Return the clusters and score functions of the downstream task."""
        return self.downstream.score_functions(predictions)

    def score(
        self, contestant: Contestant, train: Collection, val: Collection, test: Collection, seed: int
    ) -> Scores:
        """Train a copy of the contestant's encoder by the task's recipe, and score it on `test`."""
        from ssl3d_benchmarks.finetune.recipe import score_by_recipe

        return score_by_recipe(self, self.downstream, contestant, train, val, test, seed)
