"""2D networks made 3D: `to_3d`, and encoders from them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
