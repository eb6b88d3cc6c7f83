"""bitsandbytes.optim.adamw."""

from .... import optim as core
from . import adam as _adam  # noqa: F401  # whose classes are the bases here
from ._served import served

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]

AdamW = served(core.AdamW, __name__)
AdamW8bit = served(core.AdamW8bit, __name__)
AdamW32bit = served(core.AdamW32bit, __name__)
PagedAdamW = served(core.PagedAdamW, __name__)
PagedAdamW8bit = served(core.PagedAdamW8bit, __name__)
PagedAdamW32bit = served(core.PagedAdamW32bit, __name__)
