"""The public interface: all that plugins import. Names are loaded when first used; `api.pyi` lists them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub("ssl3d", __file__)
