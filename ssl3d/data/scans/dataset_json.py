"""Folders that a `dataset.json` describes: Medical Segmentation Decathlon, nnU-Net, MONAI."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.amounts import count_of
from ssl3d.data.scans.folders import dataset_name, missing, walk
from ssl3d.data.scans.found import Found, Scan, Wanted, modality_code
from ssl3d.data.scans.read import is_whole, stem_of, suffix_of, without_suffix
from ssl3d.data.scans.subjects import person_of, relative, subjects_of
from ssl3d.errors import DataError


def from_dataset_json(root: Path, wanted: Wanted) -> Found:
    """List the scans of a folder of the Medical Segmentation Decathlon or nnU-Net, or of MONAI's lists."""
    described = read_json_object(root / "dataset.json")
    channels = described.get("channel_names") or described.get("modality") or {}
    if not isinstance(channels, dict):
        channels = dict(enumerate(channels if isinstance(channels, list) else [channels]))
    names = _channel_names(channels)
    named = dataclasses.replace(wanted, dataset=wanted.dataset or str(described.get("name") or ""))
    if any(isinstance(entry, dict) for _, entry in _entries(described)):
        contents = _from_listed(root, named, described, names)
    else:
        contents = from_nnunet(root, named, names)
    add_mask_labels(contents, dataset_name(root, named), described)
    return contents


def add_mask_labels(contents: Found, dataset: str, described: dict[str, Any]) -> None:
    """Add what a `dataset.json` says of its masks: names of the values, what is ignored, regions.

    `labels` maps values to names (Medical Segmentation Decathlon), or names to values; nnU-Net calls the
    value of voxels that nobody annotated `ignore`, and lists several values where structures overlap, with
    `regions_class_order` for what a prediction writes.
    """
    labels = described.get("labels")
    if not isinstance(labels, dict) or not labels:
        return
    if all(_is_value(str(key)) for key in labels):
        contents.label_names[dataset] = {str(value): str(name) for value, name in labels.items()}
        return
    values = {str(name): _values_of(value) for name, value in labels.items()}
    odd = sorted(name for name, own in values.items() if not own)
    if odd:
        contents.notes.append(
            f"dataset.json: labels not used, as they are no values of a mask: {', '.join(odd)}"
        )
    ignored = next((name for name in values if name.lower() == "ignore"), "")
    if len(values.get(ignored, ())) == 1:
        contents.ignore_labels[dataset] = values.pop(ignored)[0]
    contents.label_names[dataset] = {str(own[0]): name for name, own in values.items() if len(own) == 1}
    if any(len(own) > 1 for own in values.values()):
        regions = {name: own for name, own in values.items() if own and own != [0]}
        _add_regions(contents, dataset, regions, described.get("regions_class_order"))


def _values_of(value: Any) -> list[int]:
    """Return the values that a label of `dataset.json` stands for; none where it is no such thing."""
    several = value if isinstance(value, list) else [value]
    return [int(each) for each in several] if all(_is_value(str(each)) for each in several) else []


def _add_regions(contents: Found, dataset: str, regions: dict[str, list[int]], order: Any) -> None:
    """Add regions, with the class that a prediction writes for each."""
    classes = order if isinstance(order, list) and all(_is_value(str(each)) for each in order) else []
    if len(classes) != len(regions):
        contents.notes.append(
            f"dataset.json: {len(regions)} regions, and regions_class_order is {str(order)[:60]}; expected "
            "a number for each, so the regions are numbered in their order"
        )
        classes = list(range(1, len(regions) + 1))
    contents.regions[dataset] = [
        {"name": name, "values": values, "class": int(number)}
        for (name, values), number in zip(regions.items(), classes, strict=True)
    ]


def _is_value(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _channel_names(channels: dict[Any, Any]) -> tuple[str, ...]:
    """Put the channels in their order: by number -> name, or name -> number, or as they are written."""
    if all(_is_value(str(key)) for key in channels):
        return tuple(str(channels[key]) for key in sorted(channels, key=int))
    if all(isinstance(value, int) for value in channels.values()):
        return tuple(str(name) for name in sorted(channels, key=lambda name: int(channels[name])))
    return tuple(str(value) for value in channels.values())


def _entries(described: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (split, entry) of all that a `dataset.json` lists; no splits without a validation part."""
    own = bool(described.get("validation"))
    for part, split in (("training", "train"), ("validation", "val"), ("test", "test")):
        listed = described.get(part)
        for entry in listed if isinstance(listed, list) else ():
            yield split if own else "", entry


def _from_listed(root: Path, wanted: Wanted, described: dict[str, Any], names: tuple[str, ...]) -> Found:
    contents = Found()
    dataset = dataset_name(root, wanted)
    boxes = 0
    for split, entry in _entries(described):
        fields = entry if isinstance(entry, dict) else {"image": entry}
        images = fields.get("image")
        images = images if isinstance(images, list) else [images]
        if not images or not all(isinstance(image, str) and image for image in images):
            contents.rejected.append(
                (str(entry)[:80], "listed in dataset.json without the name of an image")
            )
            continue
        boxes += "box" in fields
        try:
            files = _listed_images(root, images, names)
            mask, label = (None, None) if "box" in fields else _listed_label(root, fields.get("label"))
            scan = _listed_scan(
                dataset=dataset,
                case=stem_of(Path(images[0])),
                root=root,
                files=files,
                mask=mask,
                names=names,
                label=label,
                split=split,
            )
            contents.scans.append(scan)
        except DataError as error:
            contents.rejected.append((str(images[0]), str(error)))
    first = [scan.files[0][0] for scan in contents.scans]
    if len({stem_of(path) for path in first}) < len(first):  # p1/t1, p2/t1
        whose = subjects_of(first, root)
        contents.scans = [
            dataclasses.replace(scan, id=f"{dataset}/{without_suffix(scan.source)}", subject=whose[path])
            for scan, path in zip(contents.scans, first, strict=True)
        ]
    if boxes:
        contents.notes.append(
            f"dataset.json: boxes of {count_of(boxes, 'scan')} not read: boxes are read from files named "
            "dataset_0.json and so on"
        )
    return contents


def _listed_file(root: Path, name: str, whose: str) -> Path:
    """Find a file that dataset.json lists.

    Raises:
        DataError: The file is not there.
    """
    path = root / name
    if path.is_file():
        return path
    if whose:
        raise DataError(f"{whose} {name}, listed in dataset.json, does not exist")
    raise DataError(f"listed in dataset.json, {missing(path) if path.is_symlink() else 'no such file'}")


def _listed_label(root: Path, label: Any) -> tuple[Path | None, int | float | None]:
    """Return the mask, or the class or value, that an entry's `label` tells of.

    Raises:
        DataError: `label` is a file that is not there, or none of these.
    """
    if label is None or label == "":
        return None, None
    if isinstance(label, str):
        return _listed_file(root, label, "its mask"), None
    if isinstance(label, int | float) and np.isfinite(label):
        return None, int(label) if float(label).is_integer() else float(label)
    raise DataError(f"its label in dataset.json is {str(label)[:40]}; expected a mask's file or one number")


def _listed_images(root: Path, images: Sequence[str], names: Sequence[str]) -> list[Path]:
    """Find the files of an entry: as listed, or the channels of a case whose name alone is listed.

    So does nnU-Net's first version: la_003.nii.gz stands for la_003_0000.nii.gz, la_003_0001.nii.gz.

    Raises:
        DataError: A file is not there.
    """
    first = root / images[0]
    if len(images) == 1 and not first.exists():
        ending = suffix_of(first)
        beside = sorted(first.parent.iterdir()) if first.parent.is_dir() else []
        parts = [
            re.fullmatch(r"(.+)_(\d{4})", stem_of(path)) for path in beside if suffix_of(path) == ending
        ]
        numbers = [int(part[2]) for part in parts if part and part[1] == stem_of(first)]
        if numbers and numbers == list(range(max(len(names), 1))):
            return [first.with_name(f"{stem_of(first)}_{number:04d}{ending}") for number in numbers]
        if numbers:
            raise DataError(
                f"listed in dataset.json, which names {count_of(len(names), 'channel')}; there are "
                f"{', '.join(f'{stem_of(first)}_{number:04d}{ending}' for number in numbers)}"
            )
    return [_listed_file(root, image, "") for image in images]


def _listed_scan(
    *,
    dataset: str,
    case: str,
    root: Path,
    files: Sequence[Path],
    mask: Path | None,
    names: tuple[str, ...],
    label: int | float | None,
    split: str,
) -> Scan:
    """Make a scan of an entry of dataset.json: one file with all channels, or a file per channel.

    Raises:
        DataError: There are more or fewer files than channels named.
    """
    several = len(files) > 1
    if several and names and len(names) != len(files):
        raise DataError(f"{len(files)} images in dataset.json, which names {len(names)} channels")
    channels = names or (tuple(f"channel{i}" for i in range(len(files))) if several else ("image",))
    return Scan(
        id=f"{dataset}/{case}",
        dataset=dataset,
        subject=person_of(case),
        source=relative(files[0], root),
        files=tuple((file,) for file in files),
        channels=channels,
        frames_are_channels=len(names) > 1 and not several,
        mask=mask,
        label=label,
        split=split,
        modality=modality_code(names[0]) if names else "",
        named=True,
    )


def from_nnunet(root: Path, wanted: Wanted, names: tuple[str, ...] = ()) -> Found:
    """List the cases of `imagesTr/CASE_0000.nii.gz`, a file per channel, with `labelsTr/CASE.nii.gz`."""
    contents = Found()
    dataset = dataset_name(root, wanted)
    for images, labels in (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs")):
        if not (root / images).is_dir():
            continue
        dead: list[Path] = []
        maps = {}
        if (root / labels).is_dir():
            maps = {stem_of(path): path for path in walk(root / labels, dead=dead)}
        cases: dict[str, dict[int, Path]] = defaultdict(dict)
        for path in walk(root / images, dead=dead):
            if not is_whole(path):
                continue
            channel = re.fullmatch(r"(.+)_(\d{4})", stem_of(path))
            if channel:
                cases[channel[1]][int(channel[2])] = path
            else:
                cases[stem_of(path)][0] = path
        contents.rejected += [(relative(path, root), missing(path)) for path in dead]
        count = max([len(names), *(max(case) + 1 for case in cases.values())], default=0)
        channels = names or (("image",) if count == 1 else tuple(f"channel{i}" for i in range(count)))
        if len(channels) < count:
            raise DataError(f"{root}: {count} channels in {images}, {len(channels)} named in dataset.json")
        for case, members in cases.items():
            first = members[min(members)]
            alone = len(members) == 1 and len(channels) > 1 and not re.search(r"_\d{4}$", stem_of(first))
            contents.scans.append(
                Scan(
                    id=f"{dataset}/{case}",
                    dataset=dataset,
                    subject=person_of(case),
                    source=relative(first, root),
                    files=((first,),)
                    if alone
                    else tuple((members[i],) if i in members else () for i in range(len(channels))),
                    channels=channels,
                    frames_are_channels=alone,
                    mask=maps.get(case),
                    modality=modality_code(channels[0]),
                    named=True,
                )
            )
    return contents


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        DataError: The file cannot be read, is no JSON, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected one JSON object")
    return content


def named_in_json(path: Path) -> Iterator[Path]:
    """Yield the scans and masks that a `dataset.json` lists, whether they exist or not.

    Raises:
        DataError: The file is no JSON.
    """
    for _, entry in _entries(read_json_object(path)):
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    yield path.parent / name
