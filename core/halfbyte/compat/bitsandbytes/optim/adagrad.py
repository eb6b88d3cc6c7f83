"""bitsandbytes.optim.adagrad."""

from .... import optim as core
from ._served import served

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]

Adagrad = served(core.Adagrad, __name__)
Adagrad8bit = served(core.Adagrad8bit, __name__)
Adagrad32bit = served(core.Adagrad32bit, __name__)
