"""halfbyte as bitsandbytes: importing this makes `import bitsandbytes` give this very module.

What stands in it is told by `surface`.  Import it before peft, Trainer, trl and diffusers; what those found out before
is put right where it can be, and is an ImportError where not.
"""

import sys
from importlib import import_module

import halfbyte_boot

from ... import __version__ as halfbyte_version
from .. import repairs

__version__ = halfbyte_boot.VERSION
__halfbyte_version__ = halfbyte_version

repairs.check()
halfbyte_boot.activate()  # before the surface, which must not meet another bitsandbytes

_surface = import_module(".surface", __name__)
__all__ = list(_surface.__all__)
globals().update({name: getattr(_surface, name) for name in __all__})

repairs.apply(sys.modules[__name__])
