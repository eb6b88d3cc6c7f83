"""bitsandbytes.optim.lars."""

from .... import optim as core
from ._served import served

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]

LARS = served(core.LARS, __name__)
LARS8bit = served(core.LARS8bit, __name__)
LARS32bit = served(core.LARS32bit, __name__)
PytorchLARS = served(core.PytorchLARS, __name__)
