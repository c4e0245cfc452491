"""Dice after some minutes of training from scratch: this package, nnU-Net v2 and MONAI's U-Net.

python benchmarks/scripts/quality_vs_nnunet.py --data STORE [--subjects 16] [--minutes 5 15 45]
    [--sides ours nnunet monai] [--encoder scratch:resnet18:acs:width=32] [--part test] [--test-subjects 0]
    [--configuration auto] [--python PYTHON] [--seed 0] [--threads 1] [--out runs/quality]

Every side gets the same training subjects (a nested subset of the house split's training part), the same
number of threads and the same time, and is scored by the same function on the same volumes of --part, each
in a fresh process. The clock is the processor time of that process, so that other work on the machine takes
nothing from anybody: on an idle machine with one thread it is the wall clock; every side reads and augments
in its own process. It runs from the first training step to the last. Preparation, planning and prediction
cost nothing.

* ours: the recipe of `ssl3d finetune --task segmentation` as it is planned, no validation, weights of the
  last step; the learning rate, and how far the average of the weights reaches back, go by the share of the
  time, as those of the others do.
* nnunet: nnU-Net v2 (pip install nnunetv2), its own fingerprint, planner, preprocessing, trainer and
  predictor with mirroring; no validation epochs; its learning rate falls with the share of the time. The
  configuration is 2d where nnU-Net's ratio of spacings (3) is passed, else 3d_fullres.
* monai: MONAI (pip install monai), the U-Net of its tutorials (16 to 256 channels, two residual units,
  batch norm) with Dice + cross-entropy, AdamW at 1e-3, a cosine, a third of the crops on the foreground,
  random affine, flips, noise and intensity; on slices of up to 192 squared, twelve a step, where spacing is
  thick, else on crops of up to 96 cubed, two a step.

--python names an interpreter for those two that has nnunetv2 and monai beside this package. A side that is
not installed is named and left out. A cell that was done is read from --out again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("ours", "nnunet", "monai")
NEEDS = {"nnunet": "nnunetv2", "monai": "monai"}
THICK = 3.0
Outcome = tuple[list[np.ndarray], dict[str, Any]]
"""Predicted mask values of each volume, and what is told of the training."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run every cell of the table that is missing and print the table."""
    arguments = _arguments(argv)
    if arguments.worker:
        print(json.dumps(_work(arguments)))
        return
    rows = []
    for side in arguments.sides:
        reason = _missing(side, arguments.python)
        if reason:
            print(f"{side}: {reason}", file=sys.stderr)
            continue
        for minutes in arguments.minutes:
            rows.append(_cell(arguments, side, minutes))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    print(_table(rows, arguments))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 15.0, 45.0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--encoder", default="scratch:resnet18:acs:width=32")
    parser.add_argument("--part", choices=("val", "test"), default="test")
    parser.add_argument("--test-subjects", type=int, default=0, help="the first so many; 0 for all")
    parser.add_argument("--configuration", default="auto")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _missing(side: str, python: str) -> str:
    """Say why a side cannot run, or nothing."""
    module = NEEDS.get(side)
    if module is None:
        return ""
    code = f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"
    if subprocess.run([python, "-c", code], check=False).returncode:
        return f"{module} is not installed for {python}: left out"
    return ""


def _cell(arguments: argparse.Namespace, side: str, minutes: float) -> dict[str, Any]:
    """Return the outcome of one side after some minutes: read it, or run it in a fresh process."""
    asked = {
        "side": side, "minutes": minutes, "data": arguments.data.stem, "subjects": arguments.subjects,
        "part": arguments.part, "test_subjects": arguments.test_subjects, "seed": arguments.seed,
        "threads": arguments.threads, "encoder": arguments.encoder if side == "ours" else "",
        "configuration": arguments.configuration if side == "nnunet" else "",
    }  # fmt: skip
    name = f"{asked['data']}-{arguments.subjects}-{side}-{minutes:g}-{arguments.seed}"
    path = arguments.out / f"{name}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return kept
    words = [
        arguments.python if side in NEEDS else sys.executable,
        __file__, "--worker", side, "--minutes", str(minutes),
        *(f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in (
            "data", "subjects", "encoder", "part", "test_subjects", "configuration", "seed", "threads",
            "out",
        )),
    ]  # fmt: skip
    limits = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(words, env=os.environ | limits, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: the process ended with status {done.returncode}")
    outcome = {"asked": asked, **json.loads(done.stdout.strip().splitlines()[-1])}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    return outcome


def _line(row: dict[str, Any]) -> str:
    asked = row["asked"]
    classes = ", ".join(f"{name} {value:.3f}" for name, value in row["classes"].items())
    return (
        f"{asked['data']}, {asked['subjects']} subjects, {asked['side']}, {asked['minutes']:g} minutes: "
        f"Dice {row['dice']:.3f} ({classes}); {row['steps']} steps of {row['batch']} in "
        f"{row['seconds']:.0f} s"
    )


def _table(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Format Dice by side and minutes."""
    minutes = sorted({row["asked"]["minutes"] for row in rows})
    sides = [side for side in SIDES if any(row["asked"]["side"] == side for row in rows)]
    lines = [
        f"{arguments.data.stem}, {arguments.subjects} training subjects, {arguments.part} part; "
        f"{arguments.threads} thread(s) of {platform.processor() or platform.machine()}",
        "| minutes | " + " | ".join(sides) + " |",
        "|---" * (len(sides) + 1) + "|",
    ]
    for wanted in minutes:
        cells = []
        for side in sides:
            matching = [r for r in rows if r["asked"]["side"] == side and r["asked"]["minutes"] == wanted]
            cells.append(_dice_cell(matching[0]) if matching else "")
        lines.append(f"| {wanted:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _dice_cell(row: dict[str, Any]) -> str:
    """Format the Dice of a cell, with the seconds it took where they are over its time."""
    over = row["seconds"] > 1.05 * 60 * row["asked"]["minutes"]
    return f"{row['dice']:.3f}" + (f" (in {row['seconds']:.0f} s)" if over else "")


# In the process of one side -----------------------------------------------------------------------


def _work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score one side; what others print goes to stderr."""
    import torch

    torch.set_num_threads(arguments.threads)
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        run = {"ours": _ours, "nnunet": _nnunet, "monai": _monai}[arguments.worker]
        labels, about = run(arguments, *_parts(arguments))
    finally:
        sys.stdout = output
    return _scored(arguments, labels) | about


def _parts(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the volumes to train on and those to score."""
    from ssl3d.api import house_split, open_data
    from ssl3d.api import statistics as stats

    data = open_data([str(arguments.data)])
    data = data.select(np.flatnonzero(data.has_mask))
    part, people = house_split(data), data.subject_codes
    inside = np.flatnonzero(part == "train")
    count = len(np.unique(people[inside]))
    share = min(arguments.subjects / count, 1.0)
    subset = stats.nested_subsets(people[inside], None, (share,), 0, 1)[share] if share < 1 else ...
    scored = np.flatnonzero(part == arguments.part)
    if arguments.test_subjects:
        first = sorted(set(people[scored].tolist()))[: arguments.test_subjects]
        scored = scored[np.isin(people[scored], first)]
    train = data.select(inside[subset])
    assert len(np.unique(train.subject_codes)) == min(arguments.subjects, count)
    return train, data.select(scored)


def _values(data: Any) -> tuple[int, ...]:
    from ssl3d.api import mask_values

    return tuple(sorted({0}.union(*(mask_values(volume).tolist() for volume in data))))


def _scored(arguments: argparse.Namespace, labels: Sequence[np.ndarray]) -> dict[str, Any]:
    """Average Dice over volumes of a subject, subjects and classes, as the package's records do."""
    from ssl3d.api import mask_scores

    train, test = _parts(arguments)
    values = _values(train)[1:]
    people: dict[str, dict[int, list[float]]] = {}
    for volume, predicted in zip(test, labels, strict=True):
        truth = volume.read_mask().numpy()
        for value in values:
            dice = mask_scores(predicted == value, truth == value, volume.spacing).dice
            if dice is not None:
                people.setdefault(volume.subject, {}).setdefault(value, []).append(dice)
    classes = {
        str(value): float(np.mean([np.mean(own[value]) for own in people.values() if value in own]))
        for value in values
    }
    return {"dice": float(np.mean(list(classes.values()))), "classes": classes, "scored": len(people)}


class Clock:
    """Processor time of this process since the clock was made, as a share of the time allowed."""

    def __init__(self, minutes: float) -> None:
        self.allowed, self._began = minutes * 60, time.process_time()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.process_time() - self._began

    @property
    def share(self) -> float:
        """Share of the time that is over."""
        return self.seconds / self.allowed


def _ours(arguments: argparse.Namespace, train: Any, test: Any) -> Outcome:
    import dataclasses

    import torch

    from ssl3d.api import autocast
    from ssl3d_benchmarks.contestants import given, untrained
    from ssl3d_benchmarks.finetune.benchmark import Finetune
    from ssl3d_benchmarks.finetune.options import FinetuneOptions
    from ssl3d_benchmarks.finetune.recipe import planned, resolve
    from ssl3d_benchmarks.finetune.segmentation.task import Segmentation
    from ssl3d_benchmarks.finetune.train import TrainingPlan

    asked = FinetuneOptions((arguments.encoder,), task="segmentation", keep="last", eval_at=(1.0,))
    options, config = resolve(asked, Segmentation.Config(), {"keep", "eval_at"})
    # Shapes and masks of the training subjects alone; those to score are only predicted.
    task = Segmentation(dataclasses.replace(config, classes=_values(train)), train)
    options = planned(options, task, train)
    print("\n".join(task.reasons), file=sys.stderr)
    _, like, entry = next(given((arguments.encoder,)))
    entry = untrained(entry, arguments.seed, like)
    assert entry.make is not None
    encoder = entry.make()
    cpu = torch.device("cpu")
    plan = TrainingPlan(Finetune(task), task, train, train[:0], options, arguments.seed, cpu, "ours")
    clock = Clock(arguments.minutes[0])
    model, steps = _trained_by_clock(plan, encoder, clock)
    seconds = clock.seconds
    labels = []
    with torch.inference_mode(), autocast(cpu, options.precision):
        for volume in test:
            labels.append(np.array(task.values)[task.labels(model, volume)])
    return labels, {
        "steps": steps, "batch": options.batch_size, "seconds": seconds, "patch": list(task.patch),
        "plan": list(task.reasons), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _trained_by_clock(plan: Any, encoder: Any, clock: Clock) -> tuple[Any, int]:
    """Train as `ssl3d finetune` does, for a time in place of a number of steps; return model and steps."""
    import torch

    from ssl3d.api import Loader, seed_of
    from ssl3d_benchmarks.finetune.checkpoint import Trial
    from ssl3d_benchmarks.finetune.parameters import optimizer_of
    from ssl3d_benchmarks.finetune.train import Drawing, build, gradients, rate, update_average

    options, ticks = plan.options, 1_000_000
    model = build(plan.task, encoder, plan.train, plan.seed, plan.device)
    optimizer = optimizer_of(model, options)
    loader = Loader(
        plan.train, {"finetune": (Drawing, plan.task)}, plan.batch_size,  # type: ignore[dict-item]
        seed=seed_of(plan.seed, "order"), steps=ticks, balance=False,
    )  # fmt: skip
    trial = Trial(options.lr_scratch or options.lr or 0.0, ticks, flops=1.0)  # FLOPs are not counted
    average: dict[str, torch.Tensor] = {}
    model.train()
    for batch in loader:
        if clock.share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * rate(int(clock.share * ticks), ticks, trial.lr, options)
        optimizer.zero_grad(set_to_none=True)
        gradients(plan, model, batch.groups, trial)
        if options.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        trial.step += 1
        if options.ema:
            # As many steps back as a share `ema` of all, of which so many are expected by now.
            reach = options.ema * trial.step / max(clock.share, 1e-9)
            update_average(average, model, trial.step, reach)
    model.load_state_dict(average or model.state_dict())
    return model.eval(), trial.step


def _nnunet(arguments: argparse.Namespace, train: Any, test: Any) -> Outcome:
    import nibabel

    root = (arguments.out / "nnunet" / f"{arguments.data.stem}-{arguments.subjects}").absolute()
    name = "Dataset001_Quality"
    folders = {key: root / key for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    os.environ |= {key: str(folder) for key, folder in folders.items()}
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    raw = folders["nnUNet_raw"] / name
    values = _values(train)
    table = {value: index for index, value in enumerate(values)}

    def written(volume: Any, path: Path, array: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        sides = np.diag([*reversed(volume.spacing), 1.0])
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), sides), path)

    for number, volume in enumerate(train):
        mask = volume.read_mask().numpy()
        index = np.vectorize(lambda value: table.get(value, 0), otypes=[np.uint8])(mask)
        written(volume, raw / "imagesTr" / f"case_{number:04d}_0000.nii.gz", volume.read()[0].numpy())
        written(volume, raw / "labelsTr" / f"case_{number:04d}.nii.gz", index)
    for number, volume in enumerate(test):
        written(volume, raw / "imagesTs" / f"case_{number:04d}_0000.nii.gz", volume.read()[0].numpy())
    about = {
        "channel_names": {"0": "MR"},
        "labels": {
            "background" if value == 0 else f"class {value}": index for value, index in table.items()
        },
        "numTraining": len(train),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(about), encoding="utf-8")

    import torch
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    configuration = arguments.configuration
    if configuration == "auto":
        spacing = np.median([volume.spacing for volume in train], axis=0)
        configuration = "2d" if spacing.max() / spacing.min() > THICK else "3d_fullres"
    ready = folders["nnUNet_preprocessed"] / name
    if not (ready / f"done-{configuration}").exists():
        api.extract_fingerprints([1], num_processes=1, check_dataset_integrity=False)
        api.plan_experiments([1])
        api.preprocess([1], configurations=[configuration], num_processes=[1])
        (ready / f"done-{configuration}").touch()
    plans = json.loads((ready / "nnUNetPlans.json").read_text(encoding="utf-8"))
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)
    trainer = nnUNetTrainer(
        plans | {"continue_training": False}, configuration, "all",
        json.loads((raw / "dataset.json").read_text(encoding="utf-8")), torch.device("cpu"),
    )  # fmt: skip
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # augmentation in this process, under its clock
    trainer.initialize()
    trainer.on_train_start()
    trainer.network.train()
    clock, steps = Clock(arguments.minutes[0]), 0
    while clock.share < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - clock.share) ** 0.9
        trainer.train_step(next(trainer.dataloader_train))
        steps += 1
    seconds = clock.seconds
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False
    )
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager,
        [trainer.network.state_dict()], trainer.dataset_json, "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    predictions = root / f"predicted-{arguments.minutes[0]:g}"
    predictions.mkdir(parents=True, exist_ok=True)
    cases = [[str(raw / "imagesTs" / f"case_{n:04d}_0000.nii.gz")] for n in range(len(test))]
    predictor.predict_from_files_sequential(
        cases, [str(predictions / f"case_{n:04d}") for n in range(len(test))]
    )
    labels = []
    for number in range(len(test)):
        array = np.asarray(
            nibabel.nifti1.load(predictions / f"case_{number:04d}.nii.gz").dataobj
        ).transpose(2, 1, 0)
        labels.append(np.array(values)[array.astype(int)])
    settings = trainer.configuration_manager
    return labels, {
        "steps": steps, "batch": settings.batch_size, "seconds": seconds,
        "patch": list(map(int, settings.patch_size)), "configuration": configuration,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _monai(arguments: argparse.Namespace, train: Any, test: Any) -> Outcome:
    import torch
    from monai import transforms as t
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet
    from monai.utils import set_determinism

    set_determinism(arguments.seed)
    values = _values(train)
    spacing = np.median([volume.spacing for volume in train], axis=0)
    shape = np.median(np.asarray(train.shapes)[:, 1:], axis=0)
    flat = bool(spacing[0] / spacing[1:].min() > THICK)
    axes = slice(1, 3) if flat else slice(0, 3)
    size = tuple(int(min(-(-n // 16) * 16, 192 if flat else 96)) for n in shape[axes])
    batch = 12 if flat else 2
    examples = []
    for volume in train:
        image = volume.read()
        label = torch.from_numpy(np.searchsorted(values, volume.read_mask().numpy()))[None].float()
        pairs = zip(image[0], label[0], strict=True) if flat else [(image[0], label[0])]
        examples += [{"image": a[None], "label": b[None]} for a, b in pairs]
    keys = ["image", "label"]
    turned = (math.pi / 9,) * (1 if flat else 3)
    augmented: Callable[[Any], Any] = t.Compose(
        [
            t.SpatialPadd(keys, size),
            t.RandCropByPosNegLabeld(keys, "label", size, pos=1, neg=2, num_samples=1, allow_smaller=True),
            *(t.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(len(size))),
            t.RandAffined(
                keys, prob=0.5, rotate_range=turned, scale_range=(0.2,) * len(size),
                mode=("bilinear", "nearest"), padding_mode="border",
            ),
            t.RandGaussianNoised("image", prob=0.2, std=0.1),
            t.RandScaleIntensityd("image", factors=0.2, prob=0.5),
            t.RandShiftIntensityd("image", offsets=0.2, prob=0.5),
        ]
    )  # fmt: skip
    network = UNet(
        spatial_dims=len(size), in_channels=1, out_channels=len(values), channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2), num_res_units=2, norm="batch",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-5)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    rng = np.random.default_rng(arguments.seed)
    order: list[int] = []
    clock, steps = Clock(arguments.minutes[0]), 0
    network.train()
    while clock.share < 1:
        while len(order) < batch:
            order += rng.permutation(len(examples)).tolist()
        chosen, order = order[:batch], order[batch:]
        drawn = [augmented(dict(examples[n]))[0] for n in chosen]
        image, label = (torch.stack([crop[key].as_tensor() for crop in drawn]) for key in keys)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * min(clock.share, 1)))
        optimizer.zero_grad()
        loss_of(network(image), label).backward()
        optimizer.step()
        steps += 1
    seconds = clock.seconds
    network.eval()
    labels = []
    with torch.inference_mode():
        for volume in test:
            image = volume.read()
            inputs = image.movedim(0, 1) if flat else image[None]
            logits: Any = sliding_window_inference(inputs, size, 4, network, overlap=0.5, mode="gaussian")
            index = logits.argmax(dim=1)
            labels.append(np.array(values)[(index if flat else index[0]).numpy()])
    return labels, {
        "steps": steps, "batch": batch, "seconds": seconds, "patch": list(size),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
