"""Pictures of masks: one palette, the names that the data have, and numbers that are right."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from ssl3d.api import open_data
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.pages.palette import class_titles, colour, dice_words
from ssl3d_benchmarks.finetune.segmentation.pictures import segmentation_picture
from ssl3d_benchmarks.linear_probe.pictures import masks_figure


@pytest.fixture
def data(tmp_path):
    """Two volumes whose masks have the values 0, 5 and 9, which their list names."""
    parts = Path(tmp_path / "s.partial")
    for k in range(2):
        mask = np.zeros((4, 8, 8), dtype=np.uint8)
        mask[:, 1:4, 1:4], mask[:, 5:7, 5:7] = 5, 9
        record = Record(id=f"v{k}", dataset="made", subject=f"p{k}")
        write_part(
            parts,
            record.id,
            record,
            np.random.default_rng(k).random((1, 4, 8, 8), dtype=np.float32),
            mask=mask,
        )
    assemble(parts, tmp_path / "s.h5", {"mask_labels": {"made": {"0": "background", "5": "liver"}}}, [])
    return open_data([str(tmp_path / "s.h5")])


def words_of(figure):
    texts = [text.get_text() for panel in figure.axes for text in (*panel.texts, panel.title)]
    return texts + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_classes_are_called_as_the_data_call_them(data):
    assert class_titles(data, ("0", "5", "9")) == ["0 (background)", "5 (liver)", "9"]


def test_truth_and_prediction_have_the_same_colours_and_the_dice_of_the_volume(data):
    """Mask values that are no indices were drawn past the end of the palette."""
    titles = class_titles(data, (0, 5, 9))
    truth = [np.searchsorted([0, 5, 9], volume.read_mask().numpy()) for volume in data]
    figure = masks_figure(data, truth, (0, 5, 9), titles)
    assert any(
        "Dice in the whole volume: 5 (liver) = 1.00,\n9 = 1.00" in words for words in words_of(figure)
    )
    overlays = [panel.images[1] for panel in figure.axes[1:3]]
    for image in overlays:
        shown = {to_hex(image.cmap(image.norm(k))) for k in np.unique(image.get_array().compressed())}
        assert shown == {colour(1), colour(2)}
    assert {"5 (liver)", "9"} <= set(words_of(figure))


def test_probe_and_fine_tuning_use_one_palette(data):
    titles, truth = (
        ["0", "5 (liver)", "9"],
        [np.searchsorted([0, 5, 9], v.read_mask().numpy()) for v in data],
    )
    figures = (
        masks_figure(data, truth, (0, 5, 9), titles),
        segmentation_picture(list(data), truth, [np.zeros_like(t) for t in truth], titles),
    )
    legends = [
        {
            text.get_text(): to_hex(patch.get_facecolor())
            for text, patch in zip(own.get_texts(), own.get_patches())
        }
        for figure in figures
        for own in figure.legends
    ]
    assert legends[0] == legends[1] == {"5 (liver)": colour(1), "9": colour(2)}
    assert "Dice in the whole volume:\n5 (liver) = 0.00, 9 = 0.00" in words_of(figures[1])


def test_dice_leaves_unknown_voxels_out():
    truth, predicted = (np.array(row)[None, None] for row in ([-1, -1, 1, 1, 0], [1, 1, 1, 0, 0]))
    words = dice_words(truth, predicted, ["0", "a", "b"], 60)
    assert words == f"Dice in the whole image: a = {2 / 3:.2f}, b = –"


def test_words_of_fine_tuning_stand_beside_the_images_and_within_the_picture(data):
    """White on the image they were as faint as the image was bright, and long lists were cut off."""
    titles = ["0", *(f"{k} (structure number {k})" for k in range(1, 13))]
    truth = [np.searchsorted([0, 5, 9], volume.read_mask().numpy()) for volume in data]
    figure = segmentation_picture(list(data), truth, truth, titles, ["median", "worst"])
    FigureCanvasAgg(figure).draw()
    for row in range(2):
        panels = figure.axes[6 * row : 6 * row + 6]
        for panel in panels[:2]:
            (text,) = panel.texts
            box, image = text.get_window_extent(), panel.get_window_extent()
            assert to_hex(text.get_color()) == "#000000" and box.y1 <= image.y0
            assert figure.bbox.y0 <= box.y0
            assert all(box.x1 <= other.get_window_extent().x0 for other in panels[2:])
