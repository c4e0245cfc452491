"""Pages of HTML that need no other file, whatever they show: frame, tables, figures, charts and colours."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
