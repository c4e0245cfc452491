"""Crops and batches that do not fit the data are told, once."""

from ssl3d.data.size_notes import large_batch_note, large_crop_note


def test_a_crop_is_told_where_most_volumes_are_smaller():
    shapes = [(1, 30, 40, 40), (1, 20, 64, 64), (1, 48, 48, 48)]
    assert large_crop_note("a.patch", (32, 32, 32), shapes) == (
        "note: --a.patch 32 32 32 is larger than 2 of 3 volumes (median 30 x 48 x 48 voxels): give a "
        "smaller one"
    )
    assert not large_crop_note("a.patch", (24, 32, 32), shapes)
    assert not large_crop_note(
        "a.patch", (32, 32, 32), [(1, 1, 40, 40)] * 3
    )  # crops of images have depth 1
    assert "3 of 3" in large_crop_note("a.patch", (32, 64, 32), [(1, 1, 40, 40)] * 3)


def test_a_batch_is_told_where_there_are_fewer_volumes():
    assert not large_batch_note(4, 4, "")
    assert large_batch_note(5, 4, "a batch holds 4") == (
        "note: --batch-size 5 is larger than the number of volumes, 4: a batch holds 4"
    )
