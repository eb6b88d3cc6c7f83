"""bitsandbytes.optim.lamb."""

from .... import optim as core
from ._served import served

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]

LAMB = served(core.LAMB, __name__)
LAMB8bit = served(core.LAMB8bit, __name__)
LAMB32bit = served(core.LAMB32bit, __name__)
