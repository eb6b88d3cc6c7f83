"""bitsandbytes.optim.lion."""

from .... import optim as core
from ._served import served

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]

Lion = served(core.Lion, __name__)
Lion8bit = served(core.Lion8bit, __name__)
Lion32bit = served(core.Lion32bit, __name__)
PagedLion = served(core.PagedLion, __name__)
PagedLion8bit = served(core.PagedLion8bit, __name__)
PagedLion32bit = served(core.PagedLion32bit, __name__)
