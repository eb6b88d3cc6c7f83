"""bitsandbytes.optim.ademamix."""

from .... import optim as core
from ....optim.pytorch_ademamix import PytorchAdEMAMix
from ._served import served

__all__ = ["AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit", "PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdEMAMix32bit"]

AdEMAMix = served(core.AdEMAMix, __name__)
AdEMAMix8bit = served(core.AdEMAMix8bit, __name__)
AdEMAMix32bit = served(core.AdEMAMix32bit, __name__)
PagedAdEMAMix = served(core.PagedAdEMAMix, __name__)
PagedAdEMAMix8bit = served(core.PagedAdEMAMix8bit, __name__)
PagedAdEMAMix32bit = served(core.PagedAdEMAMix32bit, __name__)

_ReferenceAdEMAMix = PytorchAdEMAMix  # bitsandbytes' name of it
