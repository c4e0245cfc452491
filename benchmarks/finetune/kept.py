"""Models that fine-tuning keeps: what is written of a trained network, which arms', and where."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl3d.api import (
    AggregatedEncoder,
    AggregatorConfig,
    MaskPrediction,
    Model,
    Portable,
    Prediction,
    SliceAggregator,
    Ssl3dError,
    amend_model,
    autocast,
    identity_hash,
    memory_format,
    model_folders,
    not_written,
    plugins,
    read_model_card,
    save_model,
    to_memory_format,
)
from ssl3d_benchmarks.finetune.protocol import FinetuneTask, task_class

if TYPE_CHECKING:
    from ssl3d.api import Collection, Encoder, Result
    from ssl3d_benchmarks.finetune.checkpoint import Trial
    from ssl3d_benchmarks.finetune.options import FinetuneOptions
    from ssl3d_benchmarks.finetune.train import TrainingPlan

FOLDER = "models"
"""Folder of the models in that of the records."""
BEST, ALL, NONE = "best", "all", "none"


class FinetunedModel(Model):
    """Network that was fine-tuned on a downstream task, which predicts as it did when it was scored.

    Args:
        network: Network of the task.
        card: Content of `model.json`.
        task: Task, as far as predictions need it.
    """

    def __init__(self, network: nn.Module, card: dict[str, Any], task: FinetuneTask) -> None:
        super().__init__(network, card)
        self.task = task
        self.can_flip = task.can_flip

    def infer(self, volume: Any, flip: bool = False) -> Prediction:
        """Predict a volume in the precision of the training's predictions."""
        with self._inference():
            predicted = self.task.infer(self.network, volume, flip)
        if isinstance(predicted, MaskPrediction):
            return dataclasses.replace(predicted, slabs=self._slabs(iter(predicted.slabs)))
        return predicted

    def portable(self) -> Portable:
        """Return the network of one window, as the task describes it."""
        return self.task.portable(self.network) or super().portable()

    def _slabs(self, slabs: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield slabs, each computed without gradients and in the model's precision."""
        while True:
            with self._inference():  # not around the yield: it would reach into the caller's work
                slab = next(slabs, None)
            if slab is None:
                return
            yield slab

    def _inference(self) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(autocast(next(self.network.parameters()).device, self.card["precision"]))
        return stack


# Writing ------------------------------------------------------------------------------------------


def wanted(options: FinetuneOptions, name: str, fraction: float) -> bool:
    """Return whether the model of a job may be kept: that of an arm's name, on a share of the subjects."""
    if ALL in options.keep_models or name in options.keep_models:
        return True
    return BEST in options.keep_models and fraction == max(options.fractions)


def keep_fold(plan: TrainingPlan, model: nn.Module, trial: Trial, result: Result, folder: Path) -> None:
    """Write the model of a fold, which has no scores yet.

    Args:
        plan: Settings and data of the training.
        model: Trained model, with the weights chosen.
        trial: Training that made it.
        result: Record that was begun.
        folder: Folder of the model.
    """
    save_model(model, folder, _card(plan, model, trial, result))


def _card(plan: TrainingPlan, model: nn.Module, trial: Trial, result: Result) -> dict[str, Any]:
    task, seen = plan.task, _joined(plan.train, plan.val)
    encoder: Any = model.encoder
    inner = encoder.encoder if isinstance(encoder, AggregatedEncoder) else encoder
    kind = type(inner)
    name = plugins.name_of(plugins.ENCODERS, kind)
    source = plugins.source_of(plugins.ENCODERS, kind)
    records = [volume.record for volume in seen]
    spacings = np.asarray(seen.spacings, dtype=float)
    settings = {key: value for key, value in task.settings().items() if key != "annotated"}
    return {
        "benchmark": plan.benchmark.name,
        "task": {
            "name": task.name,
            "record": plan.benchmark.task,
            "version": plan.benchmark.task_version,
            "target": task.target,
            "settings": json.loads(json.dumps(settings, default=str)),
            "kept": task.keep(model),
        },
        "classes": task.kinds(seen),
        "architecture": {
            "name": name,
            "config": plain(inner.config),
            "pool": plain(encoder.aggregator.config) if isinstance(encoder, AggregatedEncoder) else None,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **({"plugins": {name: source}} if source is not None else {}),
        },
        "channels": [list(names) for names in dict.fromkeys(record.channels for record in records)],
        "spacing": {
            "median": _rounded(np.median(spacings, axis=0)),
            "low": _rounded(spacings.min(axis=0)),
            "high": _rounded(spacings.max(axis=0)),
        },
        "orientations": sorted({str(name) for name in seen.orientations}),
        "normalize": sorted(
            {str((record.done.get("normalize") or {}).get("kind", "")) for record in records}
        ),
        "preprocessing": seen.settings,
        "precision": plan.options.precision,
        "training": {
            "seed": plan.seed,
            "lr": trial.lr,
            "steps": trial.total,
            "step_chosen": trial.best.get("step"),
            "validation": {plan.benchmark.main: trial.best.get("score")},
            "volumes": {"train": len(plan.train), "val": len(plan.val)},
            "datasets": sorted({str(name) for name in seen.datasets}),
            "subjects": sorted({identity_hash(*person) for person in seen.identities()}),
            "data_digest": result.data_digest,
            "split_digest": result.split_digest,
            "fraction": result.fraction,
            "threads": torch.get_num_threads(),
            "device": plan.device.type,
        },
        "contestant": {
            key: result.contestant.get(key)
            for key in ("name", "kind", "group", "source", "digest", "pretraining", "saw_labels")
        },
        "record": {"key": result.key, "main": plan.benchmark.main},
        "citations": {"task": task.reference, name: inner.paper, **_cited(inner)},
    }  # fmt: skip


def finish(result: Result, folder: Path, out: Path, options: FinetuneOptions, count: int) -> Path | None:
    """Add the scores to the models of a job's folds, and move them to their place among the models.

    Args:
        result: Record with its scores.
        folder: Folder of the job, in which the models of the folds lie.
        out: Folder of the records.
        options: Options of the command.
        count: Number of folds.

    Returns:
        Folder of the model, or of one model for each fold; None where none is kept.
    """
    if not wanted(options, str(result.contestant["name"]), result.fraction):
        return None
    scores = {name: _finite(value) for name, value in result.scores.items()}
    intervals = {name: [_finite(end) for end in ends] for name, ends in result.intervals.items()}
    seen = int(result.flags.get("seen_test_subjects") or 0)
    place = out / FOLDER / Path(result.filename).stem
    for number in range(count):
        source = folder / f"fold-{number}.model"
        target = place / f"fold-{number}" if count > 1 else place
        if not source.is_dir():  # moved already, before a kill
            continue
        about = {"scores": scores, "intervals": intervals, "seen_test_subjects": seen}
        amend_model(source, {**about, "fold": number, "folds": count})
        try:
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
        except OSError as error:
            raise not_written(error, f"cannot write {target}: {error.strerror}") from error
    if BEST in options.keep_models:
        _leave_the_best(out / FOLDER, place, options)
    return place if place.is_dir() else None


def kept_of(result: Result, out: Path) -> Path | None:
    """Return the folder of the models of a record, if they are kept."""
    place = out / FOLDER / Path(result.filename).stem
    return place if place.is_dir() else None


def _leave_the_best(models: Path, mine: Path, options: FinetuneOptions) -> None:
    """Remove models of this task that have a worse validation score than another, and were not asked for.

    Several processes may do so at once: all of them would leave the same one.
    """
    ranked: list[tuple[float, str, Path]] = []
    group = _group(mine)
    for place in sorted(models.iterdir()):
        try:
            cards = [read_model_card(folder) for folder in model_folders(place)]
        except Ssl3dError:
            continue
        if _group(place) != group or wanted_by_name(options, cards[0]):
            continue
        values = [card["training"]["validation"][card["record"]["main"]] for card in cards]
        if any(value is None for value in values):
            return  # without validation subjects nothing can be said
        ranked.append((float(np.mean(values)), place.name, place))
    for _, _, place in sorted(ranked)[:-1]:
        shutil.rmtree(place, ignore_errors=True)


def wanted_by_name(options: FinetuneOptions, card: Mapping[str, Any]) -> bool:
    """Return whether the options name the arm of a model, or all."""
    return ALL in options.keep_models or card["contestant"]["name"] in options.keep_models


def _group(place: Path) -> str:
    """Return what models have in common that were trained for the same: data, split, task and share."""
    card = read_model_card(model_folders(place)[0])
    training = card["training"]
    parts = [card["task"]["record"], card["task"]["version"], card["task"]["settings"],
             *(training[key] for key in ("data_digest", "split_digest", "fraction"))]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Reading ------------------------------------------------------------------------------------------


def restore(encoder: Encoder, card: dict[str, Any]) -> FinetunedModel:
    """Build the network of a card around an encoder, and the task as far as predictions need it."""
    about = card["task"]
    kind = task_class(about["name"])
    pool = card["architecture"].get("pool")
    if pool:
        values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in pool.items()}
        encoder = AggregatedEncoder(encoder, SliceAggregator(AggregatorConfig(**values)))
    task, network = kind.restore(about["settings"], about["target"], about["kept"], encoder)
    inner = encoder.encoder if isinstance(encoder, AggregatedEncoder) else encoder
    layout = memory_format(inner, "cpu")
    if layout is not torch.contiguous_format:
        to_memory_format(network, layout)
    return FinetunedModel(network.eval(), card, task)


def plain(config: Any) -> dict[str, Any]:
    """Convert a dataclass to what JSON holds."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return content


def _joined(train: Collection, val: Collection) -> Collection:
    """Return the volumes that the training has seen: those that it chose a step on, too."""
    whole = type(train)(train.stores)
    return whole.select(np.concatenate([train.rows, val.rows]))


def _cited(encoder: Encoder) -> dict[str, str]:
    citations = getattr(encoder, "metadata", {}).get("citations")
    return {str(k): str(v) for k, v in citations.items()} if isinstance(citations, Mapping) else {}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
