"""MONAI bundles that segment scans: a program of torch.export, configurations, and the code about them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from ssl3d.checkpoint.card import plain_value
from ssl3d.data.preparation import normalize
from ssl3d.encoders.inference import gaussian_weight, window_starts
from ssl3d.errors import UsageError
from ssl3d.export.graphs import write_program
from ssl3d.export.options import ExportOptions
from ssl3d.export.source import Source
from ssl3d.model import Model
from ssl3d.prediction.fit import SLACK, Needs, needs_of
from ssl3d.segmentation import windows


def write_bundle(source: Source, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a bundle that `python -m monai.bundle run` runs without ssl3d.

    Args:
        source: What is exported, a model of segmentation.
        folder: Folder to write into.
        options: Options of the command.

    Raises:
        UsageError: monai is missing, the model segments nothing, or its scans were prepared by options that
            the bundle's code has not.
        TrainingError: The program's outputs differ.
    """
    card = source.card
    if not isinstance(source.module, Model) or card["task"]["name"] != "segmentation":
        raise UsageError(f"--to monai-bundle: {source.word} segments no scans; --to onnx takes it")
    needs = needs_of([dict(card)])
    _require_plain(source.word, needs)
    try:
        import monai

        from ssl3d.export import bundle_scans as scans
    except ImportError as error:
        raise UsageError(f'--to monai-bundle: needs {error.name}; pip install "ssl3d[export]"') from error
    for name in ("configs", "models", "scripts"):
        (folder / name).mkdir()
    about = write_program(source, folder / "models", options)
    texts = {
        "scripts/__init__.py": '"""Code of ssl3d (Apache-2.0) for the bundle."""\n',
        "scripts/intensities.py": _replaced(
            inspect.getsource(normalize), "from ssl3d.data.scans.found import MODALITIES",
            f"MODALITIES: dict = {normalize.MODALITIES!r}",
        ),
        "scripts/windows.py": _replaced(
            inspect.getsource(windows),
            "from ssl3d.encoders.inference import gaussian_weight, window_starts",
            f"import math\n\n\n{inspect.getsource(window_starts)}\n\n{inspect.getsource(gaussian_weight)}",
        ),
        "scripts/scans.py": _replaced(
            _replaced(inspect.getsource(scans), "ssl3d.data.preparation.normalize", "scripts.intensities"),
            "ssl3d.segmentation.windows", "scripts.windows",
        ),
        "configs/inference.json": json.dumps(_inference(card, needs), indent=1) + "\n",
        "configs/metadata.json": json.dumps(_metadata(source, about, monai.__version__), indent=1,
                                            default=plain_value) + "\n",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return about


def _require_plain(word: str, needs: Needs) -> None:
    others = sorted(set(needs.options) - {"normalize"}) + ["spacing"] * (needs.fixed is not None)
    if others:
        raise UsageError(
            f"--to monai-bundle: {word}: its scans were prepared with --{others[0].replace('_', '-')}, "
            "which the bundle's code does not do; use ssl3d predict, or train on scans prepared without it"
        )
    if not needs.placed or len(needs.kinds) != 1 or not needs.kinds <= {"ct", "mr", "none"}:
        kinds, orientations = (", ".join(sorted(names)) for names in (needs.kinds, needs.orientations))
        raise UsageError(
            f"--to monai-bundle: {word}: trained on scans normalised as {kinds}, of orientation "
            f"{orientations}; a bundle takes scans of a known one, all normalised as ct, mr or none"
        )


def _replaced(text: str, old: str, new: str) -> str:
    assert old in text, old
    return text.replace(old, new)


def _inference(card: Any, needs: Needs) -> dict[str, Any]:
    settings = card["task"]["settings"]
    low, high = ([side * by for side in reversed(sides)]
                 for sides, by in ((needs.low, 1 / SLACK), (needs.high, SLACK)))  # fmt: skip
    values = [kind["value"] for kind in card["classes"]]
    return {
        "imports": ["$import glob", "$import os", "$import torch", "$import scripts.scans"],
        "bundle_root": ".",
        "dataset_dir": "$os.path.join(@bundle_root, 'scans')",
        "output_dir": "$os.path.join(@bundle_root, 'eval')",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "network": {
            "_target_": "scripts.scans.Program",
            "path": "$os.path.join(@bundle_root, 'models', 'model.pt2')",
            "device": "@device",
        },
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                {"_target_": "scripts.scans.Intensitiesd", "keys": "image", "kind": next(iter(needs.kinds)),
                 "low": low, "high": high},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "$[{'image': path} for path in @datalist]",
                    "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False,
                       "num_workers": 0},
        "inferer": {"_target_": "scripts.scans.Windows", "size": settings["patch"],
                    "overlap": settings["overlap"], "batch": settings["windows"]},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "scripts.scans.MaskValuesd", "keys": "pred", "values": values},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
                 "nearest_interp": True, "to_tensor": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "resample": False,
                 "output_postfix": "seg", "separate_folder": False,
                 "output_dtype": "$__import__('numpy').int32"},
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
            "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing", "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def _metadata(source: Source, about: dict[str, Any], monai: str) -> dict[str, Any]:
    from importlib.metadata import version

    card, shape = source.card, about["input"]["shape"]
    classes = {str(n): str(kind["name"]) for n, kind in enumerate(card["classes"])}
    channels = {str(n): str(name) for n, name in enumerate(card["channels"][0])}
    size = shape[2:]
    modality = {"mr": "MR", "ct": "CT"}.get(card["normalize"][0], "n/a")
    common = {"type": "image", "modality": modality, "dtype": "float32", "is_patch_data": True}
    scores = {name: value for name, value in (card.get("scores") or {}).items() if value is not None}
    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": "written by ssl3d export"},
        "monai_version": monai,
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel"), "scipy": version("scipy"),
                                      "pytorch-ignite": version("pytorch-ignite")},
        "name": "Segmentation by ssl3d",
        "task": f"segmentation of {', '.join(list(classes.values())[1:])}",
        "description": f"network of an encoder {card['architecture']['name']}, fine-tuned by ssl3d",
        "authors": "not known",
        "copyright": "not known",
        "data_source": ", ".join(map(str, card["training"]["datasets"])),
        "intended_use": "research only; no decision about a patient may rest on it",
        "references": [str(text) for text in card["citations"].values()],
        "eval_metrics": scores,
        "network_data_format": {
            "inputs": {"image": {**common, "format": "magnitude", "num_channels": shape[1],
                                 "spatial_shape": size, "value_range": [], "channel_def": channels}},
            "outputs": {"pred": {**common, "format": "segmentation", "num_channels": len(classes),
                                 "spatial_shape": size, "value_range": [0, 1], "channel_def": classes}},
        },
    }  # fmt: skip
