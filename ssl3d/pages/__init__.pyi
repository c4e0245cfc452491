from . import charts as charts
from . import elements as elements
from . import palette as palette
