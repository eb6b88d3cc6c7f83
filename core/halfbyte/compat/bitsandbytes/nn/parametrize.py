"""bitsandbytes.nn.parametrize."""

from ....nn.parametrize import (
    Bnb4bitParametrization,
    enter_cache,
    leave_cache,
    register_hooks,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]

# Names that bitsandbytes' own tests use.
_enable_parametrization_cache = enter_cache
_disable_parametrization_cache = leave_cache
_register_parametrization_hooks = register_hooks
