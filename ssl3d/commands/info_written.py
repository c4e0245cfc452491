"""What `ssl3d info` says of what other commands wrote: exports, and folders of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl3d.amounts import count_of, size
from ssl3d.errors import DataError
from ssl3d.json_files import parse_json

PREDICTIONS, EXPORT = "predict.json", "export.json"


def describe_predictions(folder: Path) -> dict[str, Any]:
    """Describe what `ssl3d predict` wrote in plain values.

    Raises:
        DataError: The folder's `predict.json` is damaged.
    """
    about = _about(folder / PREDICTIONS, "ssl3d predict")
    return {"kind": "predictions", "path": str(folder), **about}


def describe_export(folder: Path) -> dict[str, Any]:
    """Describe what `ssl3d export` wrote in plain values, with the size of its files.

    Raises:
        DataError: The folder's `export.json` is damaged.
    """
    about = _about(folder / EXPORT, "ssl3d export")
    files = {str(path.relative_to(folder)): path.stat().st_size
             for path in sorted(folder.rglob("*")) if path.is_file() and path.name != EXPORT}  # fmt: skip
    return {"kind": "export", "path": str(folder), "files": files, **about}


def _about(path: Path, command: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); let {command} write it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not what {command} writes")
    return content


def prediction_lines(info: Mapping[str, Any]) -> list[str]:
    """Return the lines that show a folder of predictions."""
    predicted, aside, seen = (
        int(info.get(key) or 0) for key in ("predicted", "set_aside", "of_training_subjects")
    )
    more = f", {count_of(aside, 'scan')} set aside (rejected.csv)" if aside else ""
    lines = [f"{info['path']}: predictions of {count_of(predicted, 'volume')}{more}; {info.get('task')}"]
    models = [str(own.get("folder")) for own in info.get("models") or () if isinstance(own, dict)]
    lines.append(f"  model{'s' * (len(models) != 1)}: {', '.join(models)}")
    lines.append(f"  scans: {' '.join(map(str, info.get('data') or ()))}")
    if labels := info.get("labels"):
        lines.append("  values: " + ", ".join(f"{value} {name}" for value, name in labels.items()))
    if seen:
        lines.append(f"  {count_of(seen, 'volume')} are of subjects that a model was trained or chosen on")
    return [*lines, f"  ssl3d view {info['path']} makes a page of them"]


def export_lines(info: Mapping[str, Any]) -> list[str]:
    """Return the lines that show an export."""
    lines = [f"{info['path']}: an export, format {info.get('format')}"]
    lines += [f"  {name}  {size(count)}" for name, count in info["files"].items()]
    takes = info.get("input") or {}
    if isinstance(takes, dict) and takes.get("shape"):
        sides = " x ".join("any" if side is None else str(side) for side in takes["shape"])
        lines.append(f"  takes {takes.get('axes', 'volumes')}: {sides}")
    card = info.get("card") or {}
    task = card.get("task") or {}
    if task:
        classes = ", ".join(str(kind.get("name")) for kind in card.get("classes") or ())
        lines.append(f"  task: {task.get('record')}{f' ({classes})' if classes else ''}")
    elif card.get("architecture"):
        lines.append(f"  encoder: {card['architecture']}")
    if "largest_difference" in info:
        lines.append(f"  largest difference from ssl3d's own outputs: {info['largest_difference']:.2g}")
    return [*lines, "  --json prints all that is known of it"]
