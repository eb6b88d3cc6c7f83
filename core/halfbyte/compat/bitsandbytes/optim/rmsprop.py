"""bitsandbytes.optim.rmsprop."""

from .... import optim as core
from ._served import served

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]

RMSprop = served(core.RMSprop, __name__)
RMSprop8bit = served(core.RMSprop8bit, __name__)
RMSprop32bit = served(core.RMSprop32bit, __name__)
