"""Every registered proxy keeps the contract, with small options."""

import pytest

from ssl3d import plugins
from ssl3d.data.phantoms import phantom_store
from ssl3d.data.store import open_data
from ssl3d.testing import check_proxy


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return open_data([phantom_store(16, folder=tmp_path_factory.mktemp("phantoms"))])


@pytest.mark.parametrize("number,name", enumerate(plugins.names(plugins.PROXIES)))
def test_proxy_keeps_the_contract(number, name, small, tiny_encoder, phantoms):
    kind = ("acs", "3d")[number % 2]
    check_proxy(name, small(name, kind), encoder=lambda: tiny_encoder(kind), data=phantoms)
