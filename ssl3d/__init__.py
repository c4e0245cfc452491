"""Self-supervised pretraining of 3D medical image encoders, with pluggable proxy tasks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
