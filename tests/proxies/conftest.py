"""Small, fast options of every proxy, for the tests that go over all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# By proxy, as in a YAML file. Chosen for `tiny_encoder` (strides of 8 in all): crops of 16 leave a last
# feature map two voxels wide, so that every kernel tap sees something.
SMALL: dict[str, dict[str, Any]] = {
    "cube_ordering": {"crop": [24, 24, 24], "gap": 1, "jitter": 1, "permutations": 20, "hidden": 32},
    "sorting": {"crop": [32, 32], "slices": 5},
    "simclr": {"crop": [16, 16, 16], "hidden": 32, "out": 16},
    "barlow_twins": {"crop": [16, 16, 16], "hidden": 32, "out": 32},
    "pcl": {"crop": [32, 32], "slices": 3, "threshold": 0.2, "hidden": 32, "out": 16},
    "glcl": {
        "crop": [32, 32],
        "schedule": "joint",
        "local_stride": 1,
        "partitions": 3,
        "negatives": 4,
        "width": 8,
        "hidden": 32,
        "out": 16,
    },
    "context_restoration": {"crop": [16, 16, 16], "width": 8},
    "mae": {"crop": [16, 16, 16], "width": 8},
    "models_genesis": {"crop": [16, 16, 16], "width": 8},
    "pseudo3d_classification": {"crop": 16},
    "transvw": {"crop": [16, 16, 16], "width": 8, "words": 8},
    "med3d": {"crop": [16, 16, 16]},
    "swav": {"crop": [16, 16, 16], "hidden": 32, "out": 16, "freeze": 0.0, "queue": 8, "queue_from": 0.0},
    "deepcluster_v2": {"crop": [16, 16, 16], "hidden": 32, "out": 16, "per_volume": 2},
    "intra_inter": {
        "plane": [16, 16],
        "slices": 4,
        "hidden": 32,
        "out": 16,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "queue": 8,
        "queue_from": 0.0,
    },
    "faster_rcnn": {
        "crop": [32, 32],
        "channels": 16,
        "hidden": 16,
        "proposals": [32, 32],
        "rpn_samples": 64,
        "roi_samples": 16,
        "most": 4,
    },
    "pseudo3d_detection": {
        "crop": [32, 32],
        "channels": 16,
        "hidden": 16,
        "min_stride": 2,
        "proposals": [32, 32],
        "rpn_samples": 64,
        "roi_samples": 16,
        "most": 4,
    },
}

# On top of these, with kernels of kind 3d: slices need slabs deeper than the encoder's stride along D.
DEEP: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"slab": 9},
    "intra_inter": {"slices": 3, "slab": 9},
    "sorting": {"crop": [16, 16], "slices": 4, "slab": 9},
    "pcl": {"crop": [16, 16], "slices": 3, "slab": 9},
    "glcl": {"crop": [16, 16], "slab": 9},
}

# On top of SMALL, where two ranks must give the gradients of one process: heads without batch norm.
RANKS: dict[str, dict[str, Any]] = {
    # All that is proposed is kept and sampled: which of two nearly equal scores is higher, a last bit says.
    "faster_rcnn": {"proposals": [4096, 4096], "rpn_samples": 4096, "roi_samples": 4096},
    "pseudo3d_detection": {"proposals": [4096, 4096], "rpn_samples": 4096, "roi_samples": 4096},
    "simclr": {"head_norm": "layer"},
    "barlow_twins": {"head_norm": "layer"},
    "pcl": {"head_norm": "layer"},
    "glcl": {"head_norm": "layer"},
    "cube_ordering": {"head_norm": "layer"},
    "intra_inter": {"dropout": 0.0},
    "swav": {"head_norm": "layer"},
    "deepcluster_v2": {"head_norm": "layer"},
}

# Strides of the encoder's four stages, where what it is fed is too thin for those of `tiny_encoder`.
_IN_PLANE = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
STRIDES: dict[str, Any] = {"pseudo3d_classification": _IN_PLANE, "pseudo3d_detection": _IN_PLANE}


def _phantoms(folder: Path) -> Path:
    from ssl3d.data.phantoms import phantom_store

    return phantom_store(12, shape=(40, 40, 40), folder=folder)


def _pictures(folder: Path) -> Path:
    """Twelve pictures in colour of three classes: bars that lie, bars that stand, and chequers."""
    from ssl3d.api import Record, assemble, write_part

    rng = np.random.default_rng(0)
    bars = np.indices((24, 28)) // 4 % 2
    for i in range(12):
        pattern = (bars[0], bars[1], bars.sum(0) % 2)[i % 3]
        image = np.clip(pattern * 0.6 + rng.uniform(0, 0.4, (3, 1, 24, 28)), 0, 1).astype(np.float32)
        record = Record(f"p/{i}", "p", f"s{i}", label=("lie", "stand", "chequer")[i % 3])
        write_part(folder / "parts", f"{i:03d}", record, image, dtype="uint8")
    assemble(folder / "parts", folder / "pictures.h5", {}, [])
    return folder / "pictures.h5"


# What a proxy learns from, where phantoms are of no use to it: makes a store in a folder.
DATA: dict[str, Callable[[Path], Path]] = {"pseudo3d_classification": _pictures}


@pytest.fixture(scope="session")
def store_of(tmp_path_factory):
    """store_of(name): the path of a small store for a proxy, made when it is first asked for."""
    made: dict[Any, Path] = {}

    def of(name):
        make = DATA.get(name, _phantoms)
        if make not in made:
            made[make] = make(tmp_path_factory.mktemp("store"))
        return made[make]

    return of


@pytest.fixture(scope="session")
def small():
    """small(name, kind="acs", ranks=False): the small options of a proxy; its defaults if not listed."""
    from ssl3d import plugins
    from ssl3d.config import from_dict

    def options(name, kind="acs", ranks=False):
        values = dict(SMALL.get(name, {}))
        values |= DEEP.get(name, {}) if kind in ("3d", "p3d") else {}
        values |= RANKS.get(name, {}) if ranks else {}
        return from_dict(plugins.load(plugins.PROXIES, name).Config, values, name)

    return options


@pytest.fixture(scope="session")
def tiny_encoder():
    """tiny_encoder(kind="acs", norm="batch", name=""): makes a narrow resnet10 with strides of 8 in all."""
    from ssl3d.encoders.resnet import ResNet10

    def make(kind="acs", norm="batch", name=""):
        own = {"stage_strides": STRIDES[name]} if name in STRIDES else {}
        config = ResNet10.Config(width=8, kind=kind, norm=norm, stem_kernel=3, stem_stride=(1, 1, 1), **own)
        return ResNet10(config)

    return make
