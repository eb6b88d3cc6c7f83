"""bitsandbytes.optim.sgd."""

from .... import optim as core
from ._served import served

__all__ = ["SGD", "SGD8bit", "SGD32bit"]

SGD = served(core.SGD, __name__)
SGD8bit = served(core.SGD8bit, __name__)
SGD32bit = served(core.SGD32bit, __name__)
