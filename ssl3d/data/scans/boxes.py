"""Boxes of objects: lists beside the scans (COCO's JSON, CSV, MONAI's JSON in mm); boxes around masks."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl3d.data.scans.read import OWN_TABLES, without_suffix
from ssl3d.data.scans.tables import NotText, number, read_json, read_table
from ssl3d.errors import DataError

if TYPE_CHECKING:
    from ssl3d.data.scans.found import Found

Box = tuple[float, ...]  # z1 y1 x1 z2 y2 x2 class; z is 0 to 1 in a picture

# As VinDr-CXR has them, and what others call the same.
_COLUMNS = {
    "image": ("image_id", "image", "path", "file", "filename", "file_name"),
    "x1": ("x_min", "xmin", "x1"),
    "y1": ("y_min", "ymin", "y1"),
    "x2": ("x_max", "xmax", "x2"),
    "y2": ("y_max", "ymax", "y2"),
    "class": ("class_name", "class", "label"),
    "number": ("class_id",),
    "reader": ("rad_id", "reader"),
}
_CORNERS = ("image", "x1", "y1", "x2", "y2")
_IN_MM = {
    "image": (*_COLUMNS["image"], "seriesuid", "id"),
    "x": ("x_mm", "coordx"),
    "y": ("y_mm", "coordy"),
    "z": ("z_mm", "coordz"),
    "w": ("w_mm", "diameter_mm"),
    "h": ("h_mm", "diameter_mm"),
    "d": ("d_mm", "diameter_mm"),
    "class": _COLUMNS["class"],
    "number": _COLUMNS["number"],
}
COLUMNS_OF_BOXES = frozenset(
    alias for table in (_COLUMNS, _IN_MM) for aliases in table.values() for alias in aliases
)
_CENTRE_AND_SIZE = ("image", "x", "y", "z", "w", "h", "d")
_NOTHING = ("no finding", "")  # a line that says so: somebody looked
_SPECK = 4  # voxels; a smaller component of a mask has no box


@dataclasses.dataclass
class Boxes:
    """What one file says of boxes.

    Attributes:
        images: Boxes of each picture, by the name that the file has for it.
        names: Class -> name of the kind of object.
        left_out: Reason -> number of boxes that were not taken for it.
        world: Whether the boxes are x y z width height depth class in mm (RAS+), x y z the centre, and not
            corners in pixels.
    """

    images: dict[str, list[Box]] = dataclasses.field(default_factory=dict)
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    world: bool = False


def with_boxes(contents: Found, root: Path, readers: str = "merge") -> Found:
    """Add the boxes that files beside the pictures tell of: COCO's JSON, CSV lists as VinDr-CXR's.

    Boxes in mm beside volumes are read from MONAI's JSON lists of detection, and from CSV lists as LUNA16's
    `annotations.csv`.

    The files are in `root` or in `root/annotations`. A picture is known by its path or the end of it, or by
    its name without ending. Pictures that no file names have no boxes (None); those that a file names and
    knows nothing of have zero boxes.

    Args:
        contents: Scans, changed in place.
        root: Folder of the scans.
        readers: Whether boxes of several readers are `merge`d, or all are `keep`t.

    Raises:
        DataError: A file is damaged, or names a class that it does not list.
    """
    for path in list_files(root):
        add_boxes(contents, path, readers)
    return contents


def add_boxes(contents: Found, path: Path, readers: str = "merge") -> None:
    """Add the boxes that one file tells of; nothing if it is no list of boxes.

    Args:
        contents: Scans, changed in place.
        path: JSON or CSV file.
        readers: Whether boxes of several readers are `merge`d, or all are `keep`t.

    Raises:
        DataError: The file is damaged, or names a class that it does not list.
    """
    try:
        said = _said(path, readers)
    except NotText as error:
        contents.notes.append(f"{error}; not used")
        return
    if said is None:
        return
    by_end = _by_end(said.images)
    matched = 0
    for i, scan in enumerate(contents.scans):
        name = _named(scan.source, by_end)
        if name is None or scan.member is not None:
            continue
        own = tuple(said.images[name])
        if said.world:
            contents.scans[i] = dataclasses.replace(scan, world_boxes=own)
        else:
            contents.scans[i] = dataclasses.replace(scan, boxes=own)
        contents.box_names.setdefault(scan.dataset, {}).update(
            {str(number): text for number, text in said.names.items()}
        )
        matched += 1
    left = "".join(f"; {count} left out: {why}" for why, count in sorted(said.left_out.items()))
    kind = "scans" if said.world else "pictures"
    contents.notes.append(f"{path.name}: boxes of {matched} of {len(contents.scans)} {kind}{left}")


def lists_boxes(path: Path) -> bool:
    """Tell whether a CSV has the columns of boxes, and so a line per box and no line per scan.

    Raises:
        NotText: The file cannot be read.
    """
    return (
        _table(path, _COLUMNS, _CORNERS) is not None or _table(path, _IN_MM, _CENTRE_AND_SIZE) is not None
    )


def unread_boxes(contents: Found, source: Path) -> list[str]:
    """Write a line for each file that tells of boxes beside a list, as a list is read alone.

    Args:
        contents: Scans of the list.
        source: File of the list.
    """
    notes = []
    for path in list_files(source.parent):
        if path.resolve() == source.resolve():
            continue
        try:
            said = _said(path, "keep")
        except DataError:  # of no use, and nobody asked for it
            continue
        by_end = _by_end(said.images) if said else {}
        if any(_named(scan.source, by_end) is not None for scan in contents.scans):
            notes.append(
                f"{path.name}: tells of boxes, which were not read, as {source.name} is the source; give "
                f"the folder ({source.parent}) as the source to have both"
            )
    return notes


def _said(path: Path, readers: str) -> Boxes | None:
    """Read what a file says of boxes; None if nothing."""
    if path.suffix.lower() == ".json":
        content = read_json(path)
        return from_coco(path, content) or from_monai(path, content)
    return from_table(path, readers) or from_world_table(path)


def from_coco(path: Path, content: Any) -> Boxes | None:
    """Read the boxes of a COCO JSON, without crowds; None if the content is of another form.

    Raises:
        DataError: An entry lacks what it must have, or names a class that is not listed.
    """
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        return None
    said = Boxes()
    try:
        pictures = {entry["id"]: entry for entry in content["images"]}
        said.images = {str(entry["file_name"]): [] for entry in pictures.values()}
        said.names = {int(entry["id"]): str(entry["name"]) for entry in content.get("categories") or ()}
        for number, entry in enumerate(content["annotations"]):
            if "bbox" not in entry:
                continue
            picture = pictures.get(entry["image_id"])
            if picture is None:
                said.left_out["of pictures that are not listed"] += 1
                continue
            kind = int(entry["category_id"])
            if said.names and kind not in said.names:
                raise DataError(
                    f"{path}: annotation {entry.get('id', number)} is of category {kind}, and the file "
                    f"lists {len(said.names)} others"
                )
            x, y, width, height = map(float, entry["bbox"])
            reason = "crowds" if entry.get("iscrowd") else ""
            _add(said, str(picture["file_name"]), (x, y, x + width, y + height), kind, picture, reason)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not as COCO has it ({type(error).__name__}: {error})") from error
    return said


def from_monai(path: Path, content: Any) -> Boxes | None:
    """Read the boxes of a MONAI detection list, in mm; None if the content is of another form.

    The form is that of MONAI's LUNA16 tutorial: lists of scans (`training`, `validation`, `test`), each
    with an `image`, `box` [[x, y, z, w, h, d], ...], centre and size in mm, and `label` [0, ...].
    Coordinates are ITK's (LPS+), as LUNA16's are, unless the file says `"space": "RAS"`. A scan in two of
    the lists must say the same in both.

    Raises:
        DataError: An entry is not of that form, or contradicts another.
    """
    if not isinstance(content, dict):
        return None
    parts = [content[key] for key in ("training", "validation", "test") if key in content]
    listed = [entry for part in parts if isinstance(part, list) for entry in part]
    if not any(isinstance(entry, dict) and "box" in entry for entry in listed):
        return None
    space = str(content.get("space", "LPS")).upper()[:3]
    if space not in ("LPS", "RAS"):
        raise DataError(f"{path}: space is {content['space']!r}; boxes are in LPS or RAS mm")
    sign = -1.0 if space == "LPS" else 1.0
    said = Boxes(world=True)
    try:
        for entry in listed:
            if not isinstance(entry, dict) or "box" not in entry:
                continue
            boxes = np.asarray(entry["box"], dtype=np.float64).reshape(-1, 6)
            kinds = np.asarray(entry.get("label", [0] * len(boxes)), dtype=np.int64).reshape(-1)
            if len(kinds) != len(boxes):
                raise DataError(f"{path}: {entry['image']} has {len(boxes)} boxes and {len(kinds)} labels")
            own: list[Box] = []
            for box, kind in zip(boxes.tolist(), kinds.tolist(), strict=True):
                if not np.isfinite(box).all():
                    said.left_out["not finite"] += 1
                elif min(box[3:]) <= 0:
                    said.left_out["without volume"] += 1
                else:
                    own.append((sign * box[0], sign * box[1], *box[2:], float(kind)))
            name = str(entry["image"])
            if said.images.setdefault(name, own) != own:
                raise DataError(f"{path}: {name} is listed twice, with different boxes")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not as MONAI has it ({type(error).__name__}: {error})") from error
    names = content.get("labels")
    if isinstance(names, dict):
        said.names = {
            int(key): str(value) for key, value in names.items() if re.fullmatch("[0-9]{1,9}", str(key))
        }
    return said


def from_world(boxes: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Convert boxes in mm into boxes in voxels, (n, 6).

    On axes that are not the scanner's, a box becomes the smallest along the voxel axes that holds it.

    Args:
        boxes: (n, 6): centre x y z and size along them, RAS+ mm.
        affine: 4 x 4, voxel (d, h, w) to RAS+ mm, of the voxels' middles.

    Example:
        >>> from_world(np.array([[10.0, 20.0, 30.0, 4.0, 2.0, 6.0]]), np.eye(4)[[2, 1, 0, 3]]).tolist()
        [[27.5, 19.5, 8.5, 33.5, 21.5, 12.5]]
    """
    half = boxes[:, 3:] / 2
    signs = np.array(list(itertools.product((-1, 1), repeat=3)))
    corners = boxes[:, None, :3] + signs[None] * half[:, None]  # (n, 8, 3)
    inverse = np.linalg.inv(np.asarray(affine, dtype=np.float64))
    voxels = corners @ inverse[:3, :3].T + inverse[:3, 3] + 0.5
    return np.concatenate([voxels.min(axis=1), voxels.max(axis=1)], axis=1).astype(np.float32)


def from_table(path: Path, readers: str = "merge") -> Boxes | None:
    """Read the boxes of a CSV with a line per box, as of VinDr-CXR; None if it lists none.

    Its columns are image_id (or path), x_min, y_min, x_max, y_max in pixels, and, if you like, class_name,
    class_id, rad_id. A line without corners ("No finding") says that somebody looked. Boxes of one class
    by several readers that overlap by half become their mean (`merge`), or all are kept (`keep`).

    Raises:
        DataError: A corner is no number, a class has two names, or the corners are those of volumes.
    """
    table = _table(path, _COLUMNS, _CORNERS)
    if table is None:
        return None
    lines, columns = table
    if lines and {"z_min", "zmin", "z1"} & {(word or "").strip().lower() for word in lines[0][1]}:
        raise DataError(
            f"{path}: corners along z too; boxes in volumes are listed in mm: "
            "path,x_mm,y_mm,z_mm,w_mm,h_mm,d_mm,label (centre and size, RAS+), or as LUNA16 has them"
        )
    said = Boxes()
    drawn: dict[str, list[tuple[str, Box]]] = defaultdict(list)
    numbers = _numbers(path, lines, columns)
    said.names = {number: name for name, number in numbers.items() if name.lower() not in _NOTHING}
    for line, row in lines:
        image = row[columns["image"]]
        if not image:
            said.left_out["in lines without the name of a picture"] += 1
            continue
        said.images.setdefault(image, [])
        corners = [row[columns[side]] for side in ("x1", "y1", "x2", "y2")]
        kind = row[columns["class"]] if "class" in columns else ""
        if not any(corners):
            continue
        x1, y1, x2, y2 = _numbers_in(corners, f"{path}, line {line}", "four numbers")
        before = len(said.images[image])
        _add(said, image, (x1, y1, x2, y2), numbers[kind], {})
        if len(said.images[image]) > before:
            reader = row[columns["reader"]] if "reader" in columns else ""
            drawn[image].append((reader, said.images[image][-1]))
    if readers == "merge" and "reader" in columns:
        said.images |= {image: merged(boxes) for image, boxes in drawn.items()}
    return said


def from_world_table(path: Path) -> Boxes | None:
    """Read the boxes of a CSV with a line per box in mm; None if it lists none.

    Its columns are path (or image, id, seriesuid), x_mm, y_mm, z_mm (the centre, RAS+), w_mm, h_mm, d_mm
    (the size along x, y and z) and, if you like, class_name and class_id: as predictions are written. Or
    they are those of LUNA16's `annotations.csv`: seriesuid, coordX, coordY, coordZ (ITK's LPS+) and
    diameter_mm. A line without numbers says that somebody looked and found nothing.

    Raises:
        DataError: A coordinate is no number, or a class has two names.
    """
    table = _table(path, _IN_MM, _CENTRE_AND_SIZE)
    if table is None:
        return None
    lines, columns = table
    sign = -1.0 if columns["x"].strip().lower() == "coordx" else 1.0
    said = Boxes(world=True)
    numbers = _numbers(path, lines, columns)
    said.names = {number: name for name, number in numbers.items() if name.lower() not in _NOTHING}
    for line, row in lines:
        if not row[columns["image"]]:
            said.left_out["in lines without the name of a scan"] += 1
            continue
        own = said.images.setdefault(row[columns["image"]], [])
        cells = [row[columns[name]] for name in _CENTRE_AND_SIZE[1:]]
        if not any(cells):
            continue
        x, y, z, *size = _numbers_in(cells, f"{path}, line {line}", "numbers")
        if not np.isfinite([x, y, z, *size]).all():
            said.left_out["not finite"] += 1
        elif min(size) <= 0:
            said.left_out["without volume"] += 1
        else:
            kind = row[columns["class"]] if "class" in columns else ""
            own.append((sign * x, sign * y, z, size[0], size[1], size[2], float(numbers[kind])))
    return said


def merged(drawn: Sequence[tuple[str, Box]], overlap: float = 0.5) -> list[Box]:
    """Merge boxes by several readers into their mean, where boxes of one class overlap.

    Args:
        drawn: (reader, box) of each box; no two boxes of one reader become one.
        overlap: Least intersection over union with the mean so far.
    """
    groups: list[list[tuple[str, Box]]] = []
    for reader, box in drawn:
        best, most = None, overlap
        for group in groups:
            if group[0][1][6] != box[6] or any(other == reader for other, _ in group):
                continue
            shared = _iou(_mean([member for _, member in group]), box)
            if shared >= most:
                best, most = group, shared
        if best is None:
            groups.append([(reader, box)])
        else:
            best.append((reader, box))
    return [_mean([box for _, box in group]) for group in groups]


def around_mask(mask: np.ndarray, least: int = _SPECK) -> tuple[np.ndarray, np.ndarray]:
    """Draw boxes around the connected components of each value of a mask; corners that touch connect.

    Args:
        mask: (D, H, W), whole numbers from 0.
        least: Smallest number of voxels of a component that gets a box.

    Returns:
        (n, 6) float32, z1 y1 x1 z2 y2 x2, the upper corner exclusive, and their values (n,).

    Example:
        >>> mask = np.zeros((4, 6, 6), int)
        >>> mask[1:3, 2:4, 2:5] = 7
        >>> boxes, values = around_mask(mask)
        >>> boxes.tolist(), values.tolist()
        ([[1.0, 2.0, 2.0, 3.0, 4.0, 5.0]], [7])
    """
    from scipy import ndimage

    boxes, values = [], []
    for value in np.unique(mask[mask > 0]):
        parts, count = ndimage.label(mask == value, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.reshape(-1), minlength=count + 1)[1:]
        for place, size in zip(ndimage.find_objects(parts), sizes, strict=True):
            if size >= least:
                boxes.append([s.start for s in place] + [s.stop for s in place])
                values.append(int(value))
    return np.array(boxes, np.float32).reshape(-1, 6), np.array(values, np.int64)


def within(boxes: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes (n, 6) to a volume (D, H, W), and tell which lie in it by a voxel or more a side."""
    limit = np.array([*shape, *shape], np.float32)
    cut = np.clip(boxes, 0, limit)
    return cut, ((cut[:, 3:] - cut[:, :3]) >= np.minimum(1, boxes[:, 3:] - boxes[:, :3]) - 1e-3).all(1) & (
        (cut[:, 3:] - cut[:, :3]) > 0
    ).all(1)


# ------------------------------------------------------------------------------------------------


def list_files(root: Path) -> Iterator[Path]:
    """Yield the files that may list boxes, in a stable order."""
    return filter(Path.is_file, _named_as_lists(root))  # to open a pipe is to wait for ever


def _named_as_lists(root: Path) -> Iterator[Path]:
    for folder in (root, root / "annotations"):
        if folder.is_dir():
            yield from sorted(folder.glob("*instances*.json"))
            yield from sorted(folder.glob("*coco*.json"))
            # MONAI's; a dataset.json without a number is a list of masks, BIDS's describes its folder.
            monai = {*folder.glob("dataset_*.json"), *folder.glob("*boxes*.json")}
            yield from sorted(monai - {folder / "dataset_description.json"})
            yield from sorted(path for path in folder.glob("*.csv") if path.name not in OWN_TABLES)


def _add(
    said: Boxes,
    image: str,
    corners: tuple[float, float, float, float],
    kind: int,
    picture: Mapping[str, Any],
    reason: str = "",
) -> None:
    """Keep a box (x1, y1, x2, y2), or count why it is of no use."""
    x1, y1, x2, y2 = corners
    if not reason and not np.isfinite(corners).all():
        reason = "not finite"
    elif not reason and (x2 <= x1 or y2 <= y1):
        reason = "without area"
    elif not reason and (
        x2 <= 0 or y2 <= 0 or x1 >= float(picture.get("width") or np.inf)
        or y1 >= float(picture.get("height") or np.inf)
    ):  # fmt: skip
        reason = "outside of their picture"
    if reason:
        said.left_out[reason] += 1
    else:
        said.images[image].append((0.0, y1, x1, 1.0, y2, x2, float(kind)))


def _table(
    path: Path, known: Mapping[str, Sequence[str]], needed: Sequence[str]
) -> tuple[list[tuple[int, dict[str, str]]], dict[str, str]] | None:
    """Read the rows and the header's word for each known column; None where a needed one is not there."""
    table = read_table(path)
    columns = table.columns(known)
    return (table.rows, columns) if set(needed) <= columns.keys() else None


def _numbers(
    path: Path, lines: Sequence[tuple[int, dict[str, str]]], columns: Mapping[str, str]
) -> dict[str, int]:
    """Number the classes as the file does, else in the order of their names, from 1."""
    kinds = {row[columns["class"]] if "class" in columns else "" for _, row in lines}
    if "number" not in columns:
        return {kind: n for n, kind in enumerate(sorted(kinds - {""}), 1)} | {"": 0}
    numbers: dict[str, int] = {}
    for line, row in lines:
        kind = row[columns["class"]] if "class" in columns else ""
        text = row[columns["number"]]
        value = number(text)
        if value is None or not value.is_integer():
            raise DataError(f"{path}, line {line}: class_id {text!r} is no whole number")
        if not kind:  # then the number is the name
            kind = row[columns.get("class", columns["number"])] = text
        if numbers.setdefault(kind, int(value)) != value:
            raise DataError(f"{path}, line {line}: class {kind!r} is {text}, and {numbers[kind]} before")
    return numbers


def _numbers_in(cells: Sequence[str], where: str, kind: str) -> list[float]:
    """Read the numbers of some cells, NaN where one is empty or says infinity.

    Raises:
        DataError: A cell holds a word.
    """
    values = [number(text) for text in cells]
    if any(
        value is None and text and not re.fullmatch("[+-]?inf(inity)?", text.lower())
        for text, value in zip(cells, values, strict=True)
    ):
        raise DataError(f"{where}: {', '.join(cells)} are not {kind}")
    return [np.nan if value is None else value for value in values]


def _by_end(images: Mapping[str, Any]) -> dict[str, str | None]:
    """Map each end of a picture's path, with and without suffix, to its name in the file; None: several."""
    ends: dict[str, str | None] = {}
    for name in images:
        parts = name.replace("\\", "/").strip("/").split("/")
        for n in range(len(parts)):
            end = "/".join(parts[n:])
            for key in {end, without_suffix(end)}:
                ends[key] = name if ends.get(key, name) == name else None
    return ends


def _named(source: str, by_end: Mapping[str, str | None]) -> str | None:
    """Find the name that a file has for a picture; None if none, or two of its names might mean it."""
    parts = source.split("/")
    for n in range(len(parts)):
        end = "/".join(parts[n:])
        for key in (end, without_suffix(end)):
            if key in by_end:
                return by_end[key]
    return None


def _mean(boxes: Sequence[Box]) -> Box:
    return (*np.mean([box[:6] for box in boxes], axis=0).tolist(), boxes[0][6])


def _iou(a: Box, b: Box) -> float:
    sides = [max(min(a[i + 3], b[i + 3]) - max(a[i], b[i]), 0.0) for i in (1, 2)]
    shared = sides[0] * sides[1]
    areas = [(box[4] - box[1]) * (box[5] - box[2]) for box in (a, b)]
    return shared / (sum(areas) - shared)
