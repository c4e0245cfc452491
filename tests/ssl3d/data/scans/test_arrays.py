"""Labels, subjects and splits of .npz files, whatever type they were saved in; odd ones are one line."""

from __future__ import annotations

import numpy as np
import pytest

from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.errors import DataError

VOLUMES = np.zeros((4, 3, 3, 3), np.uint8)


def saved(path, **arrays):
    np.savez(path, images=VOLUMES, **arrays)
    return find([path], Wanted())


def test_text_of_bytes_is_read_as_text(tmp_path):
    found = saved(
        tmp_path / "a.npz",
        patient=np.array([b"p0", b"p0", b"p1", "pß".encode()]),
        labels=np.array([b"yes", b"no", b"yes", b""]),
        split=np.array([b"train", b"Training", b"test", b""]),
    )
    assert [scan.subject for scan in found.scans] == ["p0", "p0", "p1", "pß"]
    assert [scan.label for scan in found.scans] == ["yes", "no", "yes", None]
    assert [scan.split for scan in found.scans] == ["train", "train", "test", ""]


@pytest.mark.parametrize("words", [["", "", "holdout", ""], [b"", b"", b"holdout", b""], [0, 0, 1, 0]])
def test_an_unknown_split_is_refused_as_in_a_csv(tmp_path, words):
    with pytest.raises(DataError, match=r"a\.npz, row [02]: split '(holdout|0)'; known: train, val, test"):
        saved(tmp_path / "a.npz", split=np.array(words))


LABELS = {
    "one column": (np.arange(4)[:, None], [0, 1, 2, 3]),
    "findings": (np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]]), ["0+2", "1", "none", "0+1+2"]),
    "findings as floats": (np.eye(4, 3), ["0", "1", "2", "none"]),
    "truth": (np.array([True, False, True, False]), [1, 0, 1, 0]),
    "whole": (np.array([1.0, 0, 1, 0]), [1, 0, 1, 0]),
    "real": (np.array([60.0, 61.5, 62, 63]), [60.0, 61.5, 62.0, 63.0]),
    "text": (np.array([["a"], ["b"], ["a"], [""]]), ["a", "b", "a", None]),
    "no columns": (np.zeros((4, 0)), [None] * 4),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_the_same_from_both_layouts(tmp_path, kind):
    values, expected = LABELS[kind]
    flat = [scan.label for scan in saved(tmp_path / "flat.npz", labels=values).scans]
    np.savez(tmp_path / "xmnist.npz", train_images=VOLUMES, train_labels=values)
    split = [scan.label for scan in find([tmp_path / "xmnist.npz"], Wanted()).scans]
    assert flat == split == expected
    assert [type(label) for label in flat + split] == [type(label) for label in expected] * 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.arange(3), "4 volumes, but 3 of {name}"),
        (np.arange(9), "4 volumes, but 9 of {name}"),
        (np.array(1), "4 volumes, but one value of {name}"),
        (np.array([0, 1, np.inf, 0]), "labels that are not finite"),
        (np.array([[0.2, 0.8]] * 4), "2 labels per volume, not all of them 0 or 1"),
        (np.array([["a", "b"]] * 4), "2 labels per volume, not all of them 0 or 1"),
        (np.zeros(4, complex), "labels of type complex128; expected numbers or text"),
    ],
)
def test_labels_of_no_use_are_refused_in_one_line(tmp_path, values, reason):
    found = saved(tmp_path / "flat.npz", labels=values)
    assert (found.scans, found.rejected) == ([], [("flat.npz", reason.format(name="labels"))])
    np.savez(tmp_path / "x.npz", val_images=VOLUMES, val_labels=values)
    found = find([tmp_path / "x.npz"], Wanted())
    assert (found.scans, found.rejected) == ([], [("x.npz", reason.format(name="val_labels"))])


def test_arrays_without_rows_and_columns_per_nodule_that_do_not_fit_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array(3))
    np.savez(tmp_path / "b.npz", train_images=np.array(3))
    for name in ("a", "b"):
        (_, reason) = find([tmp_path / f"{name}.npz"], Wanted()).rejected[0]
        assert "is a single value; expected one row per volume" in reason
    # Four slices of two nodules; a column with a value per nodule is spread over the slices.
    nodule = np.array([0, 0, 1, 1])
    assert [s.label for s in saved(tmp_path / "c.npz", nodule=nodule, labels=np.array([5, 7])).scans] == [
        5, 5, 7, 7,
    ]  # fmt: skip
    for wrong, reason in (
        (nodule + 1, "4 volumes, but 2 of labels"),
        (nodule[:3], "nodule is int64 of shape (3,); expected 4 integers"),
        (nodule / 2, "nodule is float64 of shape (4,); expected 4 integers"),
    ):
        assert saved(tmp_path / "c.npz", nodule=wrong, labels=np.array([5, 7])).rejected == [
            ("c.npz", reason)
        ]


def test_a_split_without_volumes_and_a_damaged_column_are_no_tracebacks(tmp_path):
    np.savez(
        tmp_path / "x.npz",
        train_images=VOLUMES,
        train_labels=np.arange(4)[:, None],
        val_images=VOLUMES[:0],
        val_labels=np.zeros((0, 1), int),
    )
    assert len(find([tmp_path / "x.npz"], Wanted()).scans) == 4
    np.savez_compressed(tmp_path / "y.npz", images=VOLUMES, labels=np.arange(1000).reshape(4, 250))
    content = bytearray((tmp_path / "y.npz").read_bytes())
    at = content.index(b"labels.npy") + 200
    content[at : at + 40] = b"\xff" * 40
    (tmp_path / "y.npz").write_bytes(bytes(content))
    assert find([tmp_path / "y.npz"], Wanted()).rejected[0][1].startswith("unreadable: ")
