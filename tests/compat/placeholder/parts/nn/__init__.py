from halfbyte.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

from . import modules

__all__ = ["Int8Params", "Linear4bit", "Linear8bitLt", "Params4bit", "modules"]
