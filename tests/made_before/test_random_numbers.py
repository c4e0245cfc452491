"""The seeds of before draw what they drew: examples, and the weights, order and views of a first step.

What fine-tuning draws, the losses of each of its steps tell, in test_results.py.
"""

import pytest

from ssl3d import plugins
from ssl3d.config import as_before

PROXIES = [
    "barlow_twins",
    "context_restoration",
    "cube_ordering",
    "deepcluster_v2",
    "faster_rcnn",
    "intra_inter",
    "mae",
    "med3d",
    "models_genesis",
    "pseudo3d_classification",
    "pseudo3d_detection",
    "simclr",
    "sorting",
    "swav",
    "transvw",
]


def test_no_proxy_of_before_is_left_out(kept):
    assert sorted(kept["proxies"]) == PROXIES


@pytest.fixture(autouse=True)
def options_of_before(made, monkeypatch):
    """Options that came since, where their defaults mean something new, are what their absence means."""
    for name in PROXIES:
        added = as_before(plugins.load(plugins.PROXIES, name).Config)
        monkeypatch.setitem(made.PROXIES, name, added | made.PROXIES[name])


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_draws_what_it_drew(name, place, made, kept):
    made.close(made.drawn(name), kept["proxies"][name]["drawn"])


@pytest.mark.parametrize("name", PROXIES)
def test_the_first_step_has_the_loss_that_it_had(name, place, made, kept):
    made.close(made.first_step(name, "run"), kept["proxies"][name]["loss"])
