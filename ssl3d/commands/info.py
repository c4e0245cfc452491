"""`ssl3d info`: what a store, a run, a model, results, predictions, an export or a scan holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d import plugins
from ssl3d.amounts import count_of, duration, parameters, printable, size
from ssl3d.checkpoint.card import plain_value
from ssl3d.commands import info_written
from ssl3d.commands.info_results import (
    describe_report,
    describe_results,
    is_report,
    report_lines,
    result_lines,
)
from ssl3d.data.store.remote import is_address
from ssl3d.errors import DataError
from ssl3d.evaluation.record_archive import result_files
from ssl3d.json_files import parse_json

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Store

summary = "show what a store, a run, a model, results, predictions, an export or a scan holds"


@dataclasses.dataclass
class InfoOptions:
    """Show what a store, a run, an encoder, a model, results, predictions, an export or a scan holds.

    Attributes:
        path: Store (.h5), folder of stores, run, encoder, model of ssl3d finetune, folder of results or
            their archive (.tar.xz), folder of ssl3d leaderboard report, ssl3d predict or ssl3d export,
            scan, folder of scans, or another toolkit's weights (.pth, .pt, .ckpt, .safetensors), with
            options behind the name.
        json: Whether to print JSON, with everything that the lines leave out.
        verify: Whether to read all of a store, and to name what is damaged.
    """

    path: str = dataclasses.field(metadata={"positional": True})
    json: bool = False
    verify: bool = False


def main(argv: Sequence[str]) -> None:
    """Describe a path on standard output."""
    from ssl3d import config

    options = config.parse("ssl3d info", InfoOptions, argv).options
    if options.verify:
        print(printable(_verified(options.path)))
        return
    described = describe(options.path)
    if options.json:
        print(json.dumps(described, indent=1, default=plain_value))
    else:
        print("\n".join(map(printable, _LINES[described["kind"]](described))))


def describe(path: str | Path) -> dict[str, Any]:
    """Describe what a path holds in plain values; `kind` is its sort.

    Raises:
        DataError: There is nothing at the path, or nothing that is known.
        CheckpointError: The path holds a damaged run or encoder.
    """
    place = Path(path)
    if str(path).partition(":")[0] == "phantoms" and not place.exists():
        return _of_stores(place)
    if is_address(path):
        return _of_stores(path)
    if not place.exists():
        from ssl3d.specs import fields_of, file_and_words, is_foreign

        file, words = file_and_words(str(path)) if is_foreign(str(path)) else ("", [])
        if not words or not Path(file).is_file():
            raise DataError(f"{place}: no such file or folder")
        return _of_weights(Path(file), str(path), fields_of(words))
    if place.is_dir():
        if (place / "config.yaml").is_file():
            return _of_run(place)
        if (place / info_written.PREDICTIONS).is_file():
            return info_written.describe_predictions(place)
        if (place / info_written.EXPORT).is_file():
            return info_written.describe_export(place)
        if (place / "encoder.json").is_file():
            return _of_encoder(place)
        if (place / "model.json").is_file() or any(place.glob("fold-*/model.json")):
            return _of_model(place)
        if (place / "sweep.yaml").is_file():
            sweep: dict[str, Any] = plugins.load(plugins.COMMANDS, "sweep").describe(place)
            return sweep
        if records := result_files(place):
            return describe_results(place, records)
        if is_report(place):
            return describe_report(place)
        if any(place.rglob("*.h5")):
            return _of_stores(place)
        return _of_folder(place)
    if place.name in ("encoder.json", "encoder.safetensors"):
        return _of_encoder(place.parent)
    if place.name in ("model.json", "model.safetensors"):
        return _of_model(place)
    if records := result_files(place):
        return describe_results(place, records)
    if place.suffix.lower() in (".h5", ".hdf5") or _is_hdf5(place):
        return _of_stores(place)
    if place.suffix.lower() in (".pth", ".pt", ".ckpt", ".safetensors"):
        return _of_weights(place, str(place))
    if place.suffix.lower() in (".csv", ".npz", ".json"):
        return _of_folder(place)
    return _of_scan([place])


def _verified(path: str) -> str:
    """Return a line that says that stores are whole, having printed what is damaged.

    Raises:
        DataError: There is no store, or something in one is damaged.
    """
    from ssl3d.data.open import holds_scans, open_data
    from ssl3d.data.store.verify import damage_of

    if holds_scans([path]):
        raise DataError(f"{path}: no store; --verify reads stores (.h5), and folders of them")
    data = open_data([path])
    damaged = 0
    for store in data.stores:
        for line in damage_of(store):
            damaged += 1
            print(printable(line))
    if damaged:
        raise DataError(f"{path}: {count_of(damaged, 'part')} of {len(data):,} volumes damaged, see above")
    return f"{path}: all of {count_of(len(data), 'volume')} read, nothing is damaged"


def _is_hdf5(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


# What is there ------------------------------------------------------------------------------------


def _of_stores(path: str | Path) -> dict[str, Any]:
    from ssl3d.data.open import open_data
    from ssl3d.data.preparation.parts import odd_masks

    data = open_data([str(path)])
    rejected = [entry for store in data.stores for entry in store.rejected]
    return {
        "kind": "store",
        "path": str(path),
        "volumes": len(data),
        "subjects": len(data.identities()),
        "rejected": len(rejected),
        "rejected_files": rejected,
        "bytes": sum(store.state[2] for store in data.stores),
        "digest": data.digest(),
        "stores": [
            {
                "path": str(store.path),
                "volumes": len(store),
                "rejected": len(store.rejected),
                "datasets": _with_values(store),
                "odd_masks": odd_masks(store.file) if store.rows["has_mask"].any() else {},
                "settings": store.settings,
            }
            for store in data.stores
        ],
    }


def _with_values(store: Store) -> dict[str, Any]:
    """Return a store's fingerprint, with `values` for `classes` where labels are measures or many kinds."""
    import numpy as np

    from ssl3d.data.store.index import NO_LABEL, TEXT_LABEL

    prints = store.fingerprint
    owner = np.array([store.datasets[dataset] for dataset, _ in store.people], object)[
        store.rows["identity"]
    ]
    for name, print_ in prints.items():
        rows = store.rows[(owner == name) & (store.rows["label_kind"] != NO_LABEL)]
        numbers = rows["label"].astype(float)
        if not len(rows) or (rows["label_kind"] == TEXT_LABEL).any():
            continue
        real = bool((numbers != np.rint(numbers)).any())  # whole numbers are classes, 1.0 too
        if real or not print_.get("classes"):
            low, middle, high = (float(f(numbers)) for f in (np.min, np.median, np.max))
            prints[name] = {key: value for key, value in print_.items() if key != "classes"} | {
                "values": {"count": len(rows), "different": len(np.unique(numbers)), "real": real,
                           "min": low, "median": middle, "max": high}
            }  # fmt: skip
    return prints


def _of_run(path: Path) -> dict[str, Any]:
    from ssl3d.checkpoint.snapshot import config_of

    options = config_of(path)
    last: dict[str, Any] = {}
    log = path / "metrics.jsonl"
    steps = 0
    if log.is_file():
        with open(log, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    last = parse_json(line)
                    steps += 1
                except ValueError:  # the line being written, or cut by a kill
                    break
    described = {
        "kind": "run",
        "path": str(path),
        "finished": (path / "encoder" / "encoder.json").is_file(),
        "steps_logged": steps,
        "last": last,
        "checkpoints": sorted(child.name for child in (path / "checkpoints").glob("*")),
        "options": options,
    }
    if described["finished"]:
        described["encoder"] = _of_encoder(path / "encoder")
    return described


def _of_encoder(path: Path) -> dict[str, Any]:
    from ssl3d.checkpoint.card import read_card
    from ssl3d.checkpoint.encoders import check_weights

    card = read_card(path)
    check_weights(path, card)
    seen = card.get("identities")
    if isinstance(seen, list):  # hashes, thousands of them
        card = {**card, "identities": len(seen)}
    weights = path / "encoder.safetensors"
    return {
        "kind": "encoder",
        "path": str(path),
        "bytes": weights.stat().st_size if weights.is_file() else 0,
        "card": card,
    }


def _of_model(path: Path) -> dict[str, Any]:
    from ssl3d.checkpoint.models import WEIGHTS, check_model, model_folders

    folders = model_folders(path)
    card, *_ = [check_model(folder) for folder in folders]
    training = card["training"] | {"subjects": len(card["training"]["subjects"])}  # hashes
    return {
        "kind": "model",
        "path": str(path),
        "models": len(folders),
        "bytes": sum((folder / WEIGHTS).stat().st_size for folder in folders),
        "card": card | {"training": training},
    }


def _of_weights(path: Path, spec: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe another toolkit's checkpoint, as it is loaded here with the options behind its name."""
    from ssl3d.convert.foreign import foreign_from

    loaded = foreign_from(spec, path, fields or {})
    encoder = loaded.encoder
    return {
        "kind": "weights",
        "path": str(path),
        "architecture": encoder.metadata["architecture"],
        **encoder.metadata["foreign"],
        "modules": {name: list(counts) for name, counts in loaded.match.modules.items()},
        "channels": list(encoder.channels),
        "strides": [list(stride) for stride in encoder.strides],
        "config": encoder.metadata["config"],
        "labels_seen": encoder.metadata["labels_seen"],
        "citation": encoder.metadata["citations"]["weights"],
        "table": str(loaded),
    }


def _of_folder(path: Path) -> dict[str, Any]:
    from ssl3d.data.scans.find import find
    from ssl3d.data.scans.found import Wanted

    sources = find([path], Wanted())
    if (
        len(sources.scans) == 1
        and path.is_dir()
        and sources.scans[0].member is None
        and not sources.scans[0].mask
    ):
        return _of_scan(list(sources.scans[0].files[0]), str(path))
    return {
        "kind": "scans",
        "path": str(path),
        "volumes": len(sources.scans),
        "subjects": len({(scan.dataset, scan.subject) for scan in sources.scans}),
        "rejected": len(sources.rejected),
        "rejected_files": [{"path": name, "reason": reason} for name, reason in sources.rejected],
        "masks": sum(scan.mask is not None for scan in sources.scans),
        "ignored": sum(scan.ignore is not None for scan in sources.scans),
        "labelled": sum(scan.label is not None for scan in sources.scans),
        "datasets": sorted({scan.dataset for scan in sources.scans}),
        "notes": sources.notes,
    }


def _of_scan(files: list[Path], shown: str = "") -> dict[str, Any]:
    import numpy as np

    from ssl3d.data.preparation.normalize import decide
    from ssl3d.data.scans.read import read

    name = shown or str(files[0])
    try:
        pixels = read(files)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    voxels = pixels.voxels
    values = voxels[np.isfinite(voxels)] if voxels.dtype.kind == "f" else voxels.reshape(-1)
    quantiles = np.percentile(values, (0, 0.5, 50, 99.5, 100)) if values.size else np.full(5, np.nan)
    return {
        "kind": "scan",
        "path": name,
        "volumes": 1,
        "rejected": 0,
        "files": len(files),
        "shape": list(voxels.shape),
        "original_shape": list(pixels.original_shape),
        "type": str(voxels.dtype),
        "spacing": [round(side, 6) for side in pixels.spacing],
        "orientation": pixels.orientation,
        "affine": pixels.affine.tolist(),
        "modality": pixels.modality,
        "normalize": decide(voxels, pixels.modality, pixels.eight_bit),
        "intensity": dict(zip(("min", "p0.5", "p50", "p99.5", "max"), quantiles.tolist(), strict=True)),
        "not_finite": int(voxels.size - values.size),
    }


# As text ------------------------------------------------------------------------------------------

ENCODER_LINES = ("architecture", "config", "channels", "strides", "embed_dim", "spacing", "patch", "sha256")
"""Entries of an encoder's card that are shown as they are."""


def _store_lines(info: dict[str, Any]) -> list[str]:
    from ssl3d.data.preparation.parts import mask_lines

    several = f" in {len(info['stores'])} stores" if len(info["stores"]) > 1 else ""
    lines = [
        f"{info['path']}: {info['volumes']:,} volumes of {info['subjects']:,} subjects{several}, "
        f"{info['rejected']:,} rejected, {info['bytes'] / 1e6:,.1f} MB, digest {info['digest']}"
    ]
    for store in info["stores"]:
        if several:
            lines.append(f"{store['path']}: {store['volumes']:,} volumes, {store['rejected']:,} rejected")
        for name, print_ in store["datasets"].items():
            lines += _fingerprint_lines(name, print_)
        lines += [f"  {line}" for line in mask_lines(store["odd_masks"])]
        chosen = {
            k: v for k, v in (store["settings"].get("options") or {}).items() if v not in ("", [], None)
        }
        if chosen:
            lines.append(
                "  options: " + ", ".join(f"{key} {_words(value)}" for key, value in chosen.items())
            )
    lines += [f"  rejected {entry['path']}: {entry['reason']}" for entry in info["rejected_files"][:20]]
    if len(info["rejected_files"]) > 20:
        lines.append(f"  and {len(info['rejected_files']) - 20} more (--json lists all)")
    return lines


def _fingerprint_lines(name: str, print_: dict[str, Any]) -> list[str]:
    marks = [f"{print_[part]:,} {part}" for part in ("masks", "labelled", "boxes") if print_.get(part)]
    if print_.get("ignored"):
        marks.append(f"{print_['ignored']:,} with voxels to ignore")
    splits = ", ".join(f"{split} {count:,}" for split, count in print_.get("splits", {}).items())
    lines = [
        f"{name}: {print_['volumes']:,} volumes of {print_['subjects']:,} subjects"
        + "".join(f", {mark}" for mark in marks)
        + f"; orientation {', '.join(print_['orientations'])}; channels {print_['channels']}; "
        f"split {splits}"
    ]
    for part, unit in (("shape", "voxels"), ("spacing", "mm")):
        low, mid, high = (print_[part][key] for key in ("min", "median", "max"))
        lines.append(f"  {part} (D, H, W): {_words(low)} to {_words(high)}, median {_words(mid)} {unit}")
    for channel, values in enumerate(print_["intensity"]):
        text = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
        lines.append(
            f"  stored intensity{f' of channel {channel}' if print_['channels'] > 1 else ''}: {text}"
        )
    if print_.get("values"):
        values = print_["values"]
        kind = "real values" if values["real"] else f"whole numbers, {values['different']:,} different"
        low, mid, high = (_words(values[key]) for key in ("min", "median", "max"))
        lines.append(f"  labels: {values['count']:,} {kind}, {low} to {high}, median {mid}")
    if print_.get("classes"):
        lines.append("  classes: " + ", ".join(f"{label} {n:,}" for label, n in print_["classes"].items()))
    return lines


def _run_lines(info: dict[str, Any]) -> list[str]:
    state = (
        "finished" if info["finished"] else f"not finished; ssl3d pretrain --resume {info['path']} goes on"
    )
    lines = [f"{info['path']}: a run, {state}; {count_of(info['steps_logged'], 'step')} logged"]
    if info["last"]:
        lines.append("  last step: " + ", ".join(f"{k} {_words(v)}" for k, v in info["last"].items()))
    lines += [f"  {key}: {_words(value)}" for key, value in info["options"].items()]
    return lines + (_encoder_lines(info["encoder"]) if "encoder" in info else [])


def _encoder_lines(info: dict[str, Any]) -> list[str]:
    card = info["card"]
    compute, data = card.get("compute") or {}, card.get("data") or {}
    trained = {
        "proxies": ", ".join(card.get("proxies") or ()),
        "steps": card.get("steps"),
        "batch size": card.get("batch_size"),
        "seed": card.get("seed"),
        "data": f"{data.get('volumes', '?')} volumes of {', '.join(data.get('datasets') or ['?'])}"
        if data
        else "",
        "subjects seen": card.get("identities"),
        "labels seen": "yes" if card.get("labels_seen") else "no",
        "time": duration(compute["seconds"]) if compute.get("seconds") else "",
        "peak memory": size(compute["peak_memory"]) if compute.get("peak_memory") else "",
        "training FLOPs": f"{compute['flops']:.2g}" if compute.get("flops") else "",
        "cite": "; ".join((card.get("citations") or {}).values()),
    }
    lines = [f"{info['path']}: an encoder, {info['bytes'] / 1e6:,.1f} MB of weights"]
    lines += [f"  {key}: {_words(card[key])}" for key in ENCODER_LINES if card.get(key) not in (None, "")]
    lines += [f"  {key}: {_words(value)}" for key, value in trained.items() if value not in (None, "")]
    return [*lines, "  --json prints the whole card"]


def _model_lines(info: dict[str, Any]) -> list[str]:
    card = info["card"]
    several = f"{info['models']} models, one for each fold," if info["models"] > 1 else "a model,"
    pairs = [(str(kind["value"]), str(kind["name"])) for kind in card["classes"]]
    classes = ", ".join(value if value == name else f"{value} {name}" for value, name in pairs)
    spacing = card["spacing"]
    lines = [
        f"{info['path']}: {several} {info['bytes'] / 1e6:,.1f} MB of weights",
        f"  task: {card['task']['record']}, version {card['task']['version']}; "
        f"{classes or 'a value'}; trained as {card['contestant']['name']}",
        f"  takes: channels {' or '.join('+'.join(names) for names in card['channels'])}; spacing "
        f"{_words(spacing['low'])} to {_words(spacing['high'])} mm (D, H, W), median "
        f"{_words(spacing['median'])}; orientation {', '.join(card['orientations'])}; normalised as "
        f"{', '.join(card['normalize'])}",
    ]
    for name, score in (card.get("scores") or {}).items():
        low, high = (card.get("intervals") or {}).get(name, (None, None))
        interval = "" if low is None else f" [{low:.4g}, {high:.4g}]"
        lines.append(f"  {name}: {'undefined' if score is None else f'{score:.4g}'}{interval}")
    if seen := card.get("seen_test_subjects"):
        lines.append(
            f"  these scores do not hold for other people: pretraining saw {count_of(seen, 'test subject')}"
        )
    network, training = card["architecture"], card["training"]
    volumes = training.get("volumes") or {}
    chosen = training.get("step_chosen")
    people = f"{training['subjects']} subjects of {', '.join(training.get('datasets') or ['?'])}"
    lines += [
        f"  network: {network['name']}, {parameters(network['parameters'])}, in {card.get('precision')}",
        f"  trained for {training.get('steps')} steps"
        + (f" (the network of step {chosen} is kept)" if chosen is not None else "")
        + f", learning rate {training.get('lr')}, seed {training.get('seed')}; {volumes.get('train', '?')} "
        f"volumes to train and {volumes.get('val', '?')} to choose by, of {people}",
        f"  to cite: {'; '.join(dict.fromkeys(map(str, (card.get('citations') or {}).values())))}",
    ]
    return [
        *lines,
        f"  ssl3d predict {info['path']} --data SCANS --out predicted; --json prints the whole card",
    ]


def _folder_lines(info: dict[str, Any]) -> list[str]:
    lines = [
        f"{info['path']}: {info['volumes']:,} scans of {info['subjects']:,} subjects "
        f"({', '.join(info['datasets'])}), {info['masks']:,} with masks, "
        + (f"{info['ignored']:,} with voxels to ignore, " if info["ignored"] else "")
        + f"{info['labelled']:,} labelled, {info['rejected']:,} rejected; "
        "ssl3d prepare makes a store of them"
    ]
    lines += [f"  {note}" for note in info["notes"]]
    return lines + [
        f"  rejected {entry['path']}: {entry['reason']}" for entry in info["rejected_files"][:20]
    ]


def _scan_lines(info: dict[str, Any]) -> list[str]:
    frames, *shape = info["shape"]
    return [
        f"{info['path']}: {_words(shape)} voxels (D, H, W)"
        + (f", {frames} frames or channels" if frames > 1 else "")
        + (f", {info['files']} files" if info["files"] > 1 else ""),
        f"  spacing {_words(info['spacing'])} mm, orientation {info['orientation']}, {info['type']}"
        + (f", modality {info['modality']}" if info["modality"] else ""),
        "  intensity: " + ", ".join(f"{key} {value:.6g}" for key, value in info["intensity"].items()),
        f"  --normalize auto takes {info['normalize']}"
        + (f"; {info['not_finite']:,} voxels are not finite: refused" if info["not_finite"] else ""),
    ]


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if hasattr(value, "tolist"):
        return _words(value.tolist())
    if isinstance(value, list | tuple):
        simple = all(isinstance(item, int | float | str) for item in value)
        return (
            (" x " if _numeric(value) else ", ").join(map(_words, value)) if simple else json.dumps(value)
        )
    return json.dumps(value, default=plain_value) if isinstance(value, dict) else str(value)


def _numeric(values: Sequence[Any]) -> bool:
    return len(values) in (3, 4) and all(isinstance(v, int | float) for v in values)


def _weights_lines(info: dict[str, Any]) -> list[str]:
    options = ", ".join(f"{key} {_words(value)}" for key, value in info["config"].items())
    return [
        *info["table"].splitlines(),
        "",
        f"  options: {options}",
        f"  channels {_words(info['channels'])}; strides {_words(info['strides'])}",
        f"  labels of volumes seen: {'yes' if info['labels_seen'] else 'no'}; cite {info['citation']}",
        f"  sha256 {info['sha256']}, {info['bytes'] / 1e6:,.1f} MB",
    ]


_LINES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "weights": _weights_lines,
    "store": _store_lines,
    "run": _run_lines,
    "encoder": _encoder_lines,
    "model": _model_lines,
    "results": result_lines,
    "report": report_lines,
    "sweep": lambda info: plugins.load(plugins.COMMANDS, "sweep").lines_of(info),
    "predictions": info_written.prediction_lines,
    "export": info_written.export_lines,
    "scans": _folder_lines,
    "scan": _scan_lines,
}
