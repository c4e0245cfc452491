"""Folders that a `dataset.json` describes: Medical Segmentation Decathlon, nnU-Net, MONAI."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl3d.amounts import count_of
from ssl3d.data.scans.folders import (
    LABEL_NAME,
    dataset_name,
    first_few,
    missing,
    missing_masks,
    walk,
    words_of,
)
from ssl3d.data.scans.found import Found, Scan, Wanted, modality_code
from ssl3d.data.scans.read import is_picture, is_whole, stem_of, suffix_of, without_suffix
from ssl3d.data.scans.subjects import person_of, relative, subjects_of
from ssl3d.data.scans.tables import cell, read_json
from ssl3d.errors import DataError

_IGNORE = "ignore"
_IMAGE_WORD = re.compile("images?|imgs?|volumes?|vol|scans?|ct|mri?|pet|t1|t2", re.IGNORECASE)
_PARTS = {"training": "train", "validation": "val", "test": "test", "testing": "test"}


def from_dataset_json(root: Path, wanted: Wanted) -> Found:
    """List the scans of a folder of the Medical Segmentation Decathlon or nnU-Net, or of MONAI's lists."""
    described = read_json_object(root / "dataset.json")
    channels = described.get("channel_names") or described.get("modality") or {}
    if not isinstance(channels, dict):
        channels = dict(enumerate(channels if isinstance(channels, list) else [channels]))
    names = _channel_names(channels)
    named = dataclasses.replace(wanted, dataset=wanted.dataset or str(described.get("name") or ""))
    if any(isinstance(entry, dict) for _, _, entry in _entries(described)):
        contents = _from_listed(root, named, described, names)
    else:
        contents = from_nnunet(root, named, names)
    add_mask_labels(contents, dataset_name(root, named), described)
    return contents


def add_mask_labels(contents: Found, dataset: str, described: dict[str, Any]) -> None:
    """Add what a `dataset.json` says of its masks: names of the values, what is ignored, regions.

    `labels` maps values to names (Medical Segmentation Decathlon), or names to values. The value of voxels
    that nobody annotated is called `ignore`, as nnU-Net does, which lists several values where structures
    overlap, with `regions_class_order` for what a prediction writes.
    """
    labels = described.get("labels")
    if not isinstance(labels, dict) or not labels:
        return
    if all(_is_value(str(key)) for key in labels):
        names = {str(value): str(name) for value, name in labels.items()}
        unknown = [value for value, name in names.items() if name.lower() == _IGNORE]
        if len(unknown) == 1:
            contents.ignore_labels[dataset] = int(unknown[0])
            del names[unknown[0]]
        contents.label_names[dataset] = names
        return
    values = {str(name): _values_of(value) for name, value in labels.items()}
    odd = sorted(name for name, own in values.items() if not own)
    if odd:
        contents.notes.append(
            f"dataset.json: labels not used, as they are no values of a mask: {', '.join(odd)}"
        )
    ignored = next((name for name in values if name.lower() == _IGNORE), "")
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


def _entries(described: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (split, case, entry) of all that a `dataset.json` lists; no splits without a validation part.

    The case is "" but in nnU-Net's `dataset`, which maps it to its images and label, wherever they are.
    """
    own = bool(described.get("validation"))
    for part, split in _PARTS.items():
        listed = described.get(part)
        for entry in listed if isinstance(listed, list) else ():
            yield split if own else "", "", entry
    cases = described.get("dataset")
    for case, entry in cases.items() if isinstance(cases, dict) else ():
        if isinstance(entry, dict):
            yield "", str(case), {"image": entry.get("images"), "label": entry.get("label")}


def _unread_lists(described: dict[str, Any]) -> list[str]:
    """Write a line for each list of scans under a name that says nothing of what they are for."""
    return [
        f"dataset.json: the list {key!r} of {count_of(len(listed), 'scan')} is not used (read are "
        f"{', '.join(_PARTS)} and nnU-Net's dataset)"
        for key, listed in described.items()
        if key not in _PARTS and isinstance(listed, list) and any(map(_tells_a_scan, listed))
    ]


def _tells_a_scan(entry: Any) -> bool:
    named = entry.get("image", entry.get("images")) if isinstance(entry, dict) else entry
    return isinstance(named, str) and is_whole(Path(named))


def _from_listed(root: Path, wanted: Wanted, described: dict[str, Any], names: tuple[str, ...]) -> Found:
    contents = Found(notes=_unread_lists(described))
    dataset = dataset_name(root, wanted)
    boxes = 0
    maskless: list[str] = []
    for split, case, entry in _entries(described):
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
                case=case or stem_of(Path(images[0])),
                root=root,
                files=files,
                mask=mask,
                names=names,
                label=label,
                split=split,
            )
            contents.scans.append(scan)
        except MissingMask as error:
            contents.rejected.append((str(images[0]), str(error)))
            maskless.append(f"{fields['label']} of {images[0]}")
        except DataError as error:
            contents.rejected.append((str(images[0]), str(error)))
    if maskless:
        contents.notes.append(missing_masks("dataset.json", maskless))
    first = [scan.files[0][0] for scan in contents.scans]
    if len({scan.id for scan in contents.scans}) < len(first):  # p1/t1, p2/t1
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


class MissingMask(DataError):
    """A mask that a list names and that is not there."""


def _listed_file(root: Path, name: str) -> Path:
    """Find a file that dataset.json lists.

    Raises:
        DataError: The file is not there.
    """
    path = root / name
    if os.path.isfile(path):
        return path
    raise DataError(f"listed in dataset.json, {missing(path) if os.path.islink(path) else 'no such file'}")


def _listed_label(root: Path, label: Any) -> tuple[Path | None, int | float | None]:
    """Return the mask, or the class or value, that an entry's `label` tells of.

    Raises:
        MissingMask: `label` is a file that is not there.
        DataError: `label` is none of these.
    """
    if label is None or (isinstance(label, str) and not cell(label)):
        return None, None
    if isinstance(label, str):
        if not os.path.isfile(root / label):
            raise MissingMask(f"its mask {label}, listed in dataset.json, does not exist")
        return root / label, None
    if isinstance(label, int | float) and abs(label) < 2**63:  # NaN is not
        return None, int(label) if float(label).is_integer() else float(label)
    raise DataError(f"its label in dataset.json is {str(label)[:40]}; expected a mask's file or one number")


def _listed_images(root: Path, images: Sequence[str], names: Sequence[str]) -> list[Path]:
    """Find the files of an entry: as listed, or the channels of a case whose name alone is listed.

    So does nnU-Net's first version: la_003.nii.gz stands for la_003_0000.nii.gz, la_003_0001.nii.gz.

    Raises:
        DataError: A file is not there.
    """
    first = root / images[0]
    if len(images) == 1 and not os.path.exists(first):
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
    return [_listed_file(root, image) for image in images]


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
        lost: list[tuple[Path, str]] = []
        maps = {}
        if (root / labels).is_dir():
            maps = {stem_of(path): path for path in walk(root / labels, lost=lost) if is_whole(path)}
        cases: dict[str, dict[int, Path]] = defaultdict(dict)
        for path in walk(root / images, lost=lost):
            if not is_whole(path):
                continue
            channel = re.fullmatch(r"(.+)_(\d{4})", stem_of(path))
            if channel:
                cases[channel[1]][int(channel[2])] = path
            else:
                cases[stem_of(path)][0] = path
        contents.rejected += [(relative(path, root), reason) for path, reason in lost]
        count = max([len(names), *(max(case) + 1 for case in cases.values())], default=0)
        channels = names or (("image",) if count == 1 else tuple(f"channel{i}" for i in range(count)))
        if len(channels) < count:
            raise DataError(f"{root}: {count} channels in {images}, {len(channels)} named in dataset.json")
        masks = _masks_of(cases, maps)
        contents.notes += _unmatched(cases, masks, maps, images, labels)
        # One picture with all colours is numbered as a first channel; one volume is a first channel.
        colours = len(channels) > 1 and all(
            set(members) == {0} and is_picture(members[0]) for members in cases.values()
        )
        for case, members in cases.items():
            first = members[min(members)]
            unnumbered = not re.search(r"_\d{4}$", stem_of(first))
            alone = colours or (len(members) == 1 and len(channels) > 1 and unnumbered)
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
                    mask=masks.get(case),
                    modality=modality_code(channels[0]),
                    named=True,
                )
            )
    return contents


def _masks_of(cases: Collection[str], maps: Mapping[str, Path]) -> dict[str, Path]:
    """Match cases with label maps by their names, other than nnU-Net's where no other could be meant.

    Such are a label map with the number of a channel, and one whose name is the image's but for words that
    say image or label (volume-0 and segmentation-0 of LiTS, case1 and case1_seg).
    """
    masks = {case: maps[case] for case in cases if case in maps}
    for key in (lambda name: (re.sub(r"_\d{4}$", "", name),), _telling_words):
        free = [stem for stem, path in maps.items() if path not in masks.values()]
        lacking = [case for case in cases if case not in masks]
        alike: dict[Any, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for names, kind in ((lacking, 0), (free, 1)):
            for name in names:
                alike[key(name)][kind].append(name)
        masks |= {own[0]: maps[said[0]] for own, said in alike.values() if len(own) == len(said) == 1}
    return masks


def _telling_words(name: str) -> tuple[str, ...]:
    """Return a name's words but for those that say image or label."""
    return tuple(
        word for word in words_of(name) if not (_IMAGE_WORD.fullmatch(word) or LABEL_NAME.search(word))
    )


def _unmatched(
    cases: Collection[str], masks: Mapping[str, Path], maps: Mapping[str, Path], images: str, labels: str
) -> list[str]:
    """Write the lines that name the label maps of no case, and the cases without one."""
    used = set(masks.values())
    unused = sorted(path.name for path in maps.values() if path not in used)
    lacking = sorted(set(cases) - masks.keys())
    lines = []
    if unused:
        lines.append(
            f"{labels}: {count_of(len(unused), 'label map')} of no image in {images}: {first_few(unused)}"
        )
    if maps and lacking:
        lines.append(
            f"{images}: {count_of(len(lacking), 'case')} of {len(cases)} without a label map in {labels}: "
            f"{first_few(lacking)}"
        )
    return lines


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        DataError: The file cannot be read, is no JSON, or holds no object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected one JSON object")
    return content


def named_in_json(path: Path) -> Iterator[Path]:
    """Yield the scans and masks that a `dataset.json` lists, whether they exist or not.

    Raises:
        DataError: The file is no JSON.
    """
    for _, _, entry in _entries(read_json_object(path)):
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    yield path.parent / name
