"""The house split: by subject, stable, stratified; what the data says holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl3d.data.split import house_split


class Columns:
    """As much of a collection as a split looks at."""

    def __init__(self, rows):
        people = sorted({(d, s) for d, s, _, _ in rows})
        self.datasets = np.array([d for d, _, _, _ in rows], object)
        self.subjects = np.array([s for _, s, _, _ in rows], object)
        self.labels = np.array([label for _, _, label, _ in rows] + [None], object)[:-1]
        self.splits = np.array([split for _, _, _, split in rows], object)
        self.subject_codes = np.array([people.index((d, s)) for d, s, _, _ in rows])
        self.has_mask = self.has_boxes = np.zeros(len(rows), bool)

    def __len__(self):
        return len(self.subjects)


def people(count, dataset="a", label=lambda i: None, split=lambda i: ""):
    return [(dataset, f"s{i}", label(i), split(i)) for i in range(count)]


ROWS = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.sampled_from([f"s{i}" for i in range(12)]),
        st.sampled_from([None, 0, 1, "x"]),
        st.sampled_from(["", "", "train", "val", "test"]),
    ),
    min_size=1,
    max_size=40,
)


@given(ROWS, st.integers(0, 3))
def test_no_subject_is_cut_and_order_does_not_matter(rows, seed):
    parts = house_split(Columns(rows), seed)
    by_person = {}
    for (dataset, subject, _, _), part in zip(rows, parts, strict=True):
        assert by_person.setdefault((dataset, subject), part) == part
    # Labels of one person's volumes may disagree here, and the first one counts: keep them in place.
    if all(label is None for _, _, label, _ in rows):
        turned = house_split(Columns(rows[::-1]), seed)
        assert turned[::-1].tolist() == parts.tolist()


def test_shares_are_exact_and_classes_even():
    rows = people(100, label=lambda i: "ill" if i % 5 == 0 else "well")
    parts = house_split(Columns(rows))
    assert {p: int((parts == p).sum()) for p in ("train", "val", "test")} == {
        "train": 60,
        "val": 20,
        "test": 20,
    }
    ill = np.array([label == "ill" for _, _, label, _ in rows])
    assert [int((ill & (parts == p)).sum()) for p in ("train", "val", "test")] == [12, 4, 4]


def test_another_seed_or_fraction_cuts_otherwise():
    rows = Columns(people(50))
    assert (house_split(rows) == house_split(rows)).all()
    assert (house_split(rows) != house_split(rows, 1)).any()
    assert (house_split(rows, fractions=(0.5, 0, 0.5)) == "val").sum() == 0
    with pytest.raises(ValueError, match="fractions"):
        house_split(rows, fractions=(0.5, 0.4, 0.2))


def test_another_data_set_moves_nobody():
    alone = house_split(Columns(people(30)))
    both = house_split(Columns(people(20, "b") + people(30)))
    assert both[20:].tolist() == alone.tolist()


@pytest.mark.parametrize("label", [lambda i: i / 7, lambda i: f"class {i}"])
def test_another_data_set_of_values_leaves_the_strata_alone(label):
    # Else subjects tested on alone would be trained on beside it.
    classes = people(60, label=lambda i: "ill" if i % 6 == 0 else "well")
    alone = house_split(Columns(classes))
    both = house_split(Columns(people(60, "b", label) + classes))
    assert both[60:].tolist() == alone.tolist()


def test_the_datas_own_split_holds():
    rows = people(30, split=lambda i: ("train", "val", "test")[i % 3])
    assert house_split(Columns(rows)).tolist() == [r[3] for r in rows]


def test_validation_subjects_come_from_train_where_there_are_none():
    rows = people(40, split=lambda i: "test" if i < 8 else "train")
    parts = house_split(Columns(rows))
    assert (parts[:8] == "test").all() and set(parts[8:]) == {"train", "val"}
    assert (parts == "val").sum() == 8  # a quarter of 32


def test_a_subject_on_both_sides_is_tested_on_and_not_trained():
    rows = [("a", "x", None, "train"), ("a", "x", None, "test"), ("a", "y", None, "train")]
    assert house_split(Columns(rows), fractions=(0.8, 0, 0.2)).tolist() == ["test", "test", "train"]


def test_real_values_are_not_classes():
    parts = house_split(Columns(people(50, label=lambda i: i / 7)))
    assert (parts == "train").sum() == 30


def test_the_cut_is_pinned():
    # Published numbers stand on this: pretraining leaves out exactly these subjects.
    test = np.flatnonzero(house_split(Columns(people(20))) == "test")
    assert test.tolist() == [0, 3, 8, 17]


@pytest.mark.parametrize("odd", [(), (None,)])
def test_whole_labels_are_split_alike_as_ints_and_as_floats(odd):
    def labels(kind):
        return lambda i: odd[0] if odd and i == 39 else kind(i % 8 == 0)

    as_int, as_float = (Columns(people(40, label=labels(kind))) for kind in (int, float))
    assert house_split(as_int).tolist() == house_split(as_float).tolist()
    positive = house_split(as_float)[::8]
    assert sorted(positive.tolist()) == ["test", "train", "train", "train", "val"]


def test_a_fraction_makes_all_labels_of_a_data_set_real():
    real = Columns(people(40, label=lambda i: 60.0 + i % 2 / 2))
    assert house_split(real).tolist() == house_split(Columns(people(40))).tolist()


@pytest.mark.parametrize("mark", ["label", "has_mask", "has_boxes"])
@pytest.mark.parametrize("dataset", "abcdef")
def test_the_few_annotated_subjects_of_many_come_into_every_part(mark, dataset):
    # Cut together with the 40 others, data set a has none of its 12 to test on.
    own = np.arange(52) >= 40
    data = Columns(people(52, dataset, lambda i: i / 7 if mark == "label" and own[i] else None))
    if mark != "label":
        setattr(data, mark, own)
    parts = house_split(data)
    counts = [int((parts[own] == part).sum()) for part in ("train", "val", "test")]
    assert 6 <= counts[0] <= 8 and min(counts) >= 2
    assert (parts == "train").sum() in (31, 32)
    together = house_split(data, by_target=False)
    assert together.tolist() == house_split(Columns(people(52, dataset))).tolist()
