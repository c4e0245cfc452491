from .network import Converted as Converted
from .network import to_3d as to_3d
from .report import Entry as Entry
from .report import Report as Report
