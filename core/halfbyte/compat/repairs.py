"""What libraries that were imported before the drop-in believe about bitsandbytes, put right.

Checked with transformers 5.24, peft 0.21 and trl 1.16; tests/compat fails when one of these names disappears.
"""

from __future__ import annotations

import sys
from types import ModuleType

from halfbyte_boot import REMEDY

# Answers that are kept: after a quantized load was tried without bitsandbytes, they are "no" for good.
ANSWERS = {
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
}

# Modules with a global `bnb`, which is None or missing when bitsandbytes was not there at their import.
IMPORTERS = (
    "peft.helpers",
    "transformers.integrations.bitsandbytes",
    "trl.generation.vllm_generation",
    "trl.experimental.online_dpo.online_dpo_trainer",
)


def check() -> None:
    """Raise ImportError where a library has decided against bitsandbytes for good."""
    diffusers = sys.modules.get("diffusers.utils.import_utils")
    if diffusers is not None and not diffusers.is_bitsandbytes_available():
        raise ImportError(
            f"diffusers was imported before halfbyte took bitsandbytes' place and found none for good: {REMEDY}",
            name="bitsandbytes",
        )


def apply(bitsandbytes: ModuleType) -> None:
    """Let the libraries ask again, and give the module to those that looked for it in vain."""
    for name, functions in ANSWERS.items():
        for function in functions:
            clear = getattr(getattr(sys.modules.get(name), function, None), "cache_clear", None)
            if clear is not None:
                clear()
    for name in IMPORTERS:
        module = sys.modules.get(name)
        if module is not None and getattr(module, "bnb", None) is None:
            module.bnb = bitsandbytes  # type: ignore[attr-defined]
