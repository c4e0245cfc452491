"""Every registered proxy keeps the contract, with small options."""

import pytest

from ssl3d import plugins
from ssl3d.data.phantoms import phantom_store
from ssl3d.data.store import open_data
from ssl3d.encoders.resnet import ResNet10
from ssl3d.testing import check_proxy
from ssl3d_proxies.sorting import SortingConfig

_SMALL = {
    "sorting": lambda cls: [
        SortingConfig(crop=(32, 32), slices=5),
        SortingConfig(crop=(32, 32), slices=4, axis="W", slab=2, relaxation="odd_even", direction="either"),
    ]
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return open_data([phantom_store(16, folder=tmp_path_factory.mktemp("phantoms"))])


@pytest.mark.parametrize("name", plugins.names(plugins.PROXIES))
def test_proxy_keeps_the_contract(name, phantoms):
    cls = plugins.load(plugins.PROXIES, name)
    for config in _SMALL.get(name, lambda cls: [_small(cls.Config)])(cls):
        check_proxy(name, config, encoder=lambda: ResNet10(ResNet10.Config(width=8)), data=phantoms)


def _small(config):
    """The default options, with cubes of 24 where the proxy has a `crop`."""
    crop = getattr(config(), "crop", None)
    return config() if crop is None else config(crop=tuple(min(n, 24) for n in crop))
