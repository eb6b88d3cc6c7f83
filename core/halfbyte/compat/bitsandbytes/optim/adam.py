"""bitsandbytes.optim.adam."""

from .... import optim as core
from ._served import served

__all__ = ["Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"]

Adam = served(core.Adam, __name__)
Adam8bit = served(core.Adam8bit, __name__)
Adam32bit = served(core.Adam32bit, __name__)
PagedAdam = served(core.PagedAdam, __name__)
PagedAdam8bit = served(core.PagedAdam8bit, __name__)
PagedAdam32bit = served(core.PagedAdam32bit, __name__)
