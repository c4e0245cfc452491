"""What is in the folders and files given: which are scans, whose, with which labels and masks.

Nothing but names, small lists (`dataset.json`, CSV) and DICOM headers is read here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl3d.data.dicom import DICOM, is_dicom
from ssl3d.data.progress import count_of
from ssl3d.data.read import ARRAYS, FORMATS, ITK, NIFTI, PICTURES, stem_of, suffix_of
from ssl3d.data.subjects import relative, split_of, subjects_by_name, subjects_of
from ssl3d.errors import DataError

_LABEL_NAME = re.compile(
    r"(?:^|[_\-. ])(?:\w*mask|\w*masks|seg|segs|segm|segmentation|segmentations|labels?|labelmaps?"
    r"|roi|rois|gt|dseg|aseg|annotation|annotations)\d*(?:$|[_\-. ])",
    re.IGNORECASE,
)
_LABEL_FOLDER = re.compile(
    r"(?:labels?|masks?|segmentations?|annotations?|ground_?truth)(?:tr|ts|val?)?", re.IGNORECASE
)
IGNORED = frozenset(
    (".json", ".csv", ".tsv", ".txt", ".md", ".h5", ".pdf", ".xml", ".xlsx", ".yaml", ".yml")
)
_HEADERLESS = frozenset(("derivatives", "sourcedata", "code"))  # of a BIDS tree: not raw scans


@dataclasses.dataclass(frozen=True)
class Scan:
    """One volume to be made, or several if its file holds frames.

    Attributes:
        id: Unique among the scans found.
        dataset: Data set.
        subject: Subject within the data set.
        source: Path relative to the root given.
        files: Per channel, the files to read: one, the slices of a DICOM series, or none if missing.
        channels: Names of the channels; one name for a file whose own channels are not known yet.
        frames_are_channels: Whether a fourth axis holds these channels.
        mask: Label map, if there is one.
        label: Class or value.
        split: "", "train", "val" or "test".
        modality: As a list beside the data says; "" where none does.
        named: Whether a list or the user named this file: then it is a scan, whatever its values.
        member: Array of an .npz and the row in it.
        boxes: (z1, y1, x1, z2, y2, x2, class) each, in pixels; None where nobody drew any.
        world_boxes: (x, y, z, w, h, d, class) each, centre and size in RAS+ mm; None where nobody drew any.
        mask_boxes: Whether the components of the mask are the boxes; an empty mask then says nothing.
    """

    id: str
    dataset: str
    subject: str
    source: str
    files: tuple[tuple[Path, ...], ...]
    channels: tuple[str, ...] = ("image",)
    frames_are_channels: bool = False
    mask: Path | None = None
    label: int | float | str | None = None
    split: str = ""
    modality: str = ""
    named: bool = False
    member: tuple[str, int] | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None
    world_boxes: tuple[tuple[float, ...], ...] | None = None
    mask_boxes: bool = False

    @property
    def all_files(self) -> list[Path]:
        """Every file that decides what this scan becomes."""
        return [path for group in self.files for path in group] + ([self.mask] if self.mask else [])


@dataclasses.dataclass
class Found:
    """What the sources hold.

    Attributes:
        scans: In a stable order.
        rejected: (path relative to its root, reason): listed or named, but of no use.
        notes: What the user should know, by name.
        label_names: Per data set, mask value -> structure.
        box_names: Per data set, box label -> kind of object.
    """

    scans: list[Scan] = dataclasses.field(default_factory=list)
    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    label_names: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    box_names: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The options that decide what is taken.

    Attributes:
        dataset: Name of the data set; "" takes it from the source.
        channels: File-name parts that are channels of one subject.
        masks: File-name part of the label maps that belong to the scans beside them; "" takes none.
        take_labels: Whether label-like files are scans.
        colour: grey, or rgb: pictures are then natural images, in folders named by their class.
        box_readers: What becomes of one object's boxes by several readers: merge, or keep.
        label: Column of lists that holds the labels; "" for the usual ones.
    """

    dataset: str = ""
    channels: tuple[str, ...] = ()
    masks: str = ""
    take_labels: bool = False
    colour: str = "grey"
    box_readers: str = "merge"
    label: str = ""


def find(sources: Sequence[str | Path], wanted: Wanted) -> Found:
    """Finds the scans in folders and files.

    Raises:
        DataError: A source does not exist, holds nothing known, or is a list that cannot be used; or no
            file's name has the part that tells masks.
    """
    found = Found()
    for source in map(Path, sources):
        here = _find_one(source, wanted)
        if not here.scans and not here.rejected and not here.notes:
            raise DataError(f"{source}: no scans found; looked for {FORMATS}, dataset.json and CSV lists")
        found.scans += here.scans
        found.rejected += here.rejected
        found.notes += here.notes
        found.label_names.update(here.label_names)
        for dataset, names in here.box_names.items():
            found.box_names.setdefault(dataset, {}).update(names)
    if wanted.label and all(scan.label is None for scan in found.scans):
        raise DataError(
            f"--label {wanted.label}: no scan has a label by it; a CSV with the columns path and "
            f"{wanted.label} says them, beside the scans or as the source"
        )
    if wanted.masks and found.scans and not any(s.mask or s.member for s in found.scans):
        found.notes.append(_no_masks([Path(source) for source in sources], wanted.masks))
    found = _distinct(found)
    found.notes += _in_two_splits(found.scans)
    return found


def in_part(name: str, index: int, count: int) -> bool:
    """Whether shard `index` of `count` (from 1) holds this name; the same everywhere and always."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count == index - 1


def _in_two_splits(scans: Sequence[Scan]) -> list[str]:
    """The line that says whose scans are in several splits."""
    splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for scan in scans:
        splits[scan.dataset, scan.subject] |= {scan.split} - {""}
    several = [f"{subject} ({', '.join(sorted(found))})"
               for (_, subject), found in splits.items() if len(found) > 1]  # fmt: skip
    if not several:
        return []
    return [
        f"{count_of(len(several), 'subject')} with scans in several splits: {_some(several)}; the house "
        "split puts all scans of a subject into the one furthest from training"
    ]


def _find_one(source: Path, wanted: Wanted) -> Found:
    from ssl3d.data import arrays, lists
    from ssl3d.data.boxes import unread_boxes, with_boxes

    if not source.exists():
        raise DataError(f"{source}: {missing(source)}")
    if source.is_file():
        source = source.absolute()  # links stay: git-annex keeps what they lead to in folders of its own
        if suffix_of(source) in (".csv", ".tsv") or source.name == "dataset.json":
            if source.name == "dataset.json":
                listed = lists.from_dataset_json(source.parent, wanted)
            else:
                listed = lists.from_csv(source, wanted)
            listed.notes += unread_boxes(listed, source)
            return listed
        if suffix_of(source) in ARRAYS:
            return arrays.from_arrays(source, wanted, source.parent)
        if suffix_of(source) in (".h5", ".hdf5"):
            raise DataError(f"{source}: a store is prepared already; give it to --data")
        if suffix_of(source) not in (*NIFTI, *ITK, *PICTURES) and not is_dicom(source):
            raise DataError(
                f"{source}: not a known format; looked for {FORMATS}, dataset.json and CSV lists"
            )
        return _from_files([source], source.parent, wanted, named=True)
    listed = lists.from_dataset_json(source, wanted) if (source / "dataset.json").is_file() else Found()
    if listed.scans or listed.rejected:  # else such a file is something else's
        found = listed
    elif _is_channelled(source):
        found = lists.from_nnunet(source, wanted)
    else:
        found = from_folder(source, wanted)
    return with_boxes(lists.with_listing(found, source, wanted.label), source, wanted.box_readers)


def from_folder(root: Path, wanted: Wanted) -> Found:
    """Scans of a folder tree without a list: BIDS, DICOM series, class folders, or just files."""
    from ssl3d.data.arrays import from_arrays
    from ssl3d.data.series import from_dicom

    found, files = Found(), []
    bids = any(child.name.startswith("sub-") and child.is_dir() for child in root.iterdir())
    dicom: dict[Path, list[Path]] = defaultdict(list)
    dead: list[Path] = []
    for path in walk(root, skip=_HEADERLESS if bids else frozenset(), dead=dead):
        ending = suffix_of(path)
        if ending in ARRAYS:
            arrays = from_arrays(path, wanted, root)
            found.scans += arrays.scans
            found.rejected += arrays.rejected
        elif ending in (*NIFTI, *ITK, *PICTURES):
            files.append(path)
        elif path.name.upper() == "DICOMDIR" or ending in IGNORED:
            continue
        elif is_dicom(path):
            dicom[path.parent].append(path)
    found.rejected += [(relative(path, root), missing(path)) for path in dead]
    plain = _from_files(files, root, wanted, named=False)
    series = from_dicom(dicom, root, wanted)
    for part in (plain, series):
        found.scans += part.scans
        found.rejected += part.rejected
        found.notes += part.notes
    return found


def walk(root: Path, skip: Iterable[str] = (), dead: list[Path] | None = None) -> Iterator[Path]:
    """Files below a folder in a stable order, without hidden ones and what the toolkit itself writes.

    That is the parts of stores being made, and the folders of runs and of results, whose pictures and
    predictions are no scans. Links are followed, but not into a folder that they lie in.

    Args:
        root: Folder.
        skip: Names of folders in it that are left out.
        dead: Gets the links that lead nowhere and whose names may be those of scans.
    """
    real = root.resolve()
    yield from _walk(root, {real, *real.parents}, set(skip), [] if dead is None else dead)


def _walk(folder: Path, above: set[Path], skipped: set[str], dead: list[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.endswith(".partial"):
            continue
        if path.is_dir():
            real = path.resolve()
            if real not in above and path.name not in skipped and not _written_here(path):
                yield from _walk(path, {*above, real}, set(), dead)
        elif path.is_file():
            yield path
        elif path.is_symlink() and _may_be_a_scan(path):
            dead.append(path)


def _may_be_a_scan(path: Path) -> bool:
    """Whether a name is one of a scan; DICOM's have no ending, or a number."""
    ending = suffix_of(path)
    return ending in (*NIFTI, *ITK, *PICTURES, *ARRAYS, *DICOM) or not re.search("[a-z]", ending)


def missing(path: Path) -> str:
    """Why there is nothing at a path."""
    if path.is_symlink():
        return "a link to a file that is not here (get the data first: datalad get, git annex get)"
    return "no such file or folder"


def _written_here(folder: Path) -> bool:
    """Whether it is a run, or a folder of results, of this toolkit."""
    if (folder / "config.yaml").is_file():
        return (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    if (folder / "table.txt").is_file():
        return any(re.search(r"-[0-9a-f]{8}$", path.stem) for path in folder.glob("*.json"))
    return (folder / ".jobs").is_dir()


def dataset_name(root: Path, wanted: Wanted) -> str:
    """`--dataset`, else the folder's name (of `imagesTr`, `images`, `data`: the folder's above)."""
    if wanted.dataset:
        return wanted.dataset
    root = root.resolve()
    generic = re.fullmatch(r"images?(tr|ts)?|data|raw|nifti|dicom", root.name, re.IGNORECASE)
    return (root.parent.name if generic else root.name) or "data"


def looks_like_label(path: Path, root: Path) -> bool:
    """Whether a file's name, or that of a folder between it and the root, says label map."""
    if _LABEL_NAME.search(stem_of(path)):
        return True
    parents = relative(path.parent, root).split("/")
    return any(_LABEL_FOLDER.fullmatch(part) for part in parents)


# Plain files --------------------------------------------------------------------------------------


def _from_files(files: Sequence[Path], root: Path, wanted: Wanted, named: bool) -> Found:
    from ssl3d.data.series import from_channels, from_dicom

    found = Found()
    if wanted.channels and not named:
        return from_channels(files, root, wanted)
    scans: list[Path] = []
    maps: list[Path] = []
    for path in files:
        like_mask = bool(wanted.masks) and bare(wanted.masks) in tokens(path)
        natural = wanted.colour == "rgb" and suffix_of(path) in PICTURES  # `mask` may be its class
        named_so = not (named or natural or wanted.take_labels) and looks_like_label(path, root)
        label = like_mask or named_so
        (maps if label else scans).append(path)
    masks = _beside(scans, maps, wanted.masks, root) if wanted.masks else {}
    unused = [relative(path, root) for path in maps if path not in masks.values()]
    if unused:
        found.notes.append(label_note(unused))
    dataset = dataset_name(root, wanted)
    subjects = subjects_of(scans, root, in_class_folders(scans, root))
    classes = _class_folders(scans, root, natural=wanted.colour == "rgb")
    if wanted.colour == "rgb":  # n01440764/10026.JPEG: the folder is no person
        subjects |= {path: relative(path, root).removesuffix(path.name) + stem_of(path) for path in classes}
    found.notes += _one_person_each(classes, subjects)
    for path in scans:
        group, split = classes.get(path, (None, ""))
        if is_dicom(path) and suffix_of(path) not in (*NIFTI, *ITK, *PICTURES):
            found.scans += from_dicom({path.parent: [path]}, root, wanted).scans
            continue
        found.scans.append(
            Scan(
                id=f"{dataset}/{relative(path, root).removesuffix(path.name) + stem_of(path)}",
                dataset=dataset,
                subject=subjects[path],
                source=relative(path, root),
                files=((path,),),
                mask=masks.get(path),
                label=group,
                split=split,
                named=named or suffix_of(path) in PICTURES or wanted.take_labels,
            )
        )
    return found


def label_note(names: Sequence[str]) -> str:
    """The line that says which files were taken for label maps."""
    return (
        f"not taken for scans, they look like label maps: {_some(names)} (--take-labels takes them, "
        "--masks PART or a CSV with a column `mask` keeps them as masks)"
    )


def _some(names: Sequence[str]) -> str:
    """The first five of these, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _no_masks(roots: Sequence[Path], part: str) -> str:
    """The line that says why no scan has a mask, where files have the part in their names.

    Raises:
        DataError: None has.
    """
    like: Counter[str] = Counter()
    matching = 0
    for root in roots:
        for path in walk(root) if root.is_dir() else ():
            if suffix_of(path) not in (*NIFTI, *ITK, *PICTURES):
                continue
            words = tokens(path)
            matching += bare(part) in words
            named = [word for word in words if _LABEL_NAME.search(word)]
            parents = relative(path.parent, root).split("/")
            named = named or [f"{folder}/" for folder in parents if _LABEL_FOLDER.fullmatch(folder)]
            like.update(set(named))
    if matching:
        return f"--masks {part}: {matching} files have it in their names, and none is one scan's alone"
    here = ", ".join(f"{word} ({count})" for word, count in like.most_common(8))
    if not any(root.is_dir() for root in roots):
        here = "a list names masks in its column `mask`"
    elif here:
        here = f"names like those of label maps here: {here}"
    else:
        here = "no name here is like those of label maps"
    raise DataError(f"--masks {part}: no file has it in its name; {here}")


def tokens(path: Path) -> list[str]:
    """The parts of a file's name between _, -, . and blanks, in lower case."""
    return [part for part in re.split(r"[_\-. ]+", stem_of(path).lower()) if part]


def bare(part: str) -> str:
    """A part of file names as `tokens` has it: `_lesion` is `lesion`."""
    return part.strip("_-. ").lower()


def _beside(scans: Sequence[Path], maps: Sequence[Path], part: str, root: Path) -> dict[Path, Path]:
    """Scan -> label map of the same folder, by name.

    The name is the scan's with the part (`a`, `a_seg`); or what is left of it without the part is in the
    names of one subject's scans alone (`volume-0`, `segmentation-0`; `p_t1`, `p_t2`, `p_seg`; `ct`, `seg`).
    """
    part = bare(part)
    rest = {path: [t for t in tokens(path) if t != part] for path in maps if part in tokens(path)}
    by_name = {(path.parent, tuple(others)): path for path, others in rest.items()}
    here: dict[Path, list[Path]] = {}
    for path in scans:
        here.setdefault(path.parent, []).append(path)
    whose = subjects_by_name(
        scans, root
    )  # and not by folders: a map of one frame is not that of the others
    found: dict[Path, list[Path]] = {}
    for path, others in rest.items():
        like = [scan for scan in here.get(path.parent, ()) if set(others) <= set(tokens(scan))]
        if like and len({whose[scan] for scan in like}) == 1:
            for scan in like:
                found.setdefault(scan, []).append(path)
    masks: dict[Path, Path] = {}
    for path in scans:
        exact = by_name.get((path.parent, tuple(tokens(path))))
        if exact is not None:
            masks[path] = exact
        elif len(found.get(path, ())) == 1:
            masks[path] = found[path][0]
    return masks


def _class_folders(
    paths: Sequence[Path], root: Path, natural: bool = False
) -> dict[Path, tuple[str | None, str]]:
    """Pictures in folders named by their class, possibly below train, val and test.

    Folders with one picture each are taken for classes only where the pictures are natural.
    """
    pictures = [path for path in paths if suffix_of(path) in PICTURES]
    if not pictures or len(pictures) < len(paths):
        return {}
    placed = {}
    for path in pictures:
        folders = relative(path, root).split("/")[:-1]
        split = next((s for s in (split_of(part) for part in folders) if s), "")
        classes = [
            part for part in folders if not split_of(part) and part.lower() not in ("images", "image")
        ]
        placed[path] = (classes[-1] if classes else None, split)
    labels = {label for label, _ in placed.values()}
    usable = None not in labels and 1 < len(labels) < len(pictures) + natural
    return {path: (label if usable else None, split) for path, (label, split) in placed.items()}


def in_class_folders(paths: Sequence[Path], root: Path) -> set[Path]:
    """The pictures in folders of classes whose names are no person's: those of people have numbers."""
    folders = _class_folders(paths, root)
    return {path for path, (label, _) in folders.items() if label and not re.search(r"\d", label)}


def _one_person_each(classes: dict[Path, tuple[str | None, str]], subjects: dict[Path, str]) -> list[str]:
    """The line that says that every class is taken for one person, if so: no split has room for that."""
    whose: dict[str, set[str]] = defaultdict(set)
    for path, (label, _) in classes.items():
        if label is not None:
            whose[label].add(subjects[path])
    if len(whose) < 2 or any(len(people) > 1 for people in whose.values()):
        return []
    return [
        f"pictures in folders named {_some(sorted(whose))}: each is taken for a class, and for one person, "
        "as names repeat from folder to folder; a CSV with path, subject and label says what is meant"
    ]


# ------------------------------------------------------------------------------------------------


def _is_channelled(root: Path) -> bool:
    """Whether the four digits at the ends of names are nnU-Net's channels, which begin at 0000.

    Those of AMOS (amos_0001, amos_0004) are people, and so are those that the label maps have too.
    """
    images, labels = ({stem_of(path) for path in walk(root / name)} if (root / name).is_dir() else set()
                      for name in ("imagesTr", "labelsTr"))  # fmt: skip
    numbered = {stem for stem in images if re.search(r"_\d{4}$", stem)}
    return any(stem.endswith("_0000") for stem in numbered) and not numbered & labels


def _distinct(found: Found) -> Found:
    """Drops what was found twice, and makes ids unique where different roots agree."""
    seen: set[Any] = set()
    scans: list[Scan] = []
    ids: Counter[str] = Counter()
    for scan in found.scans:
        key = (tuple(path.resolve() for group in scan.files for path in group), scan.member)
        if key in seen:
            continue
        seen.add(key)
        ids[scan.id] += 1
        if ids[scan.id] > 1:
            scan = dataclasses.replace(scan, id=f"{scan.id}~{ids[scan.id]}")
        scans.append(scan)
    found.scans = scans
    found.notes = list(dict.fromkeys(found.notes))
    return found
