"""The libraries that ask for bitsandbytes get a yes, also when they asked before halfbyte took its place."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from halfbyte.compat import repairs

CHECKS = {
    "transformers": """
from transformers.utils import is_bitsandbytes_available
checks = [is_bitsandbytes_available(), is_bitsandbytes_available("0.48")]
""",
    "accelerate": """
from accelerate.utils import imports
checks = [imports.is_bnb_available(), imports.is_bnb_available("0.48.0"), imports.is_4bit_bnb_available(),
          imports.is_8bit_bnb_available(), imports.is_bitsandbytes_multi_backend_available()]
""",
    "peft": """
from peft.import_utils import is_bnb_available, is_bnb_4bit_available
checks = [is_bnb_available(), is_bnb_4bit_available()]
""",
}
PRINT = """
import json
print(json.dumps(checks))
"""


def need(library: str) -> None:
    """Skip where it is not installed.  It is not imported here: peft imports bitsandbytes at once."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("library", CHECKS)
def test_availability_check_says_yes(activated, installed, library):
    need(library)
    first, path = installed

    done = activated(CHECKS[library] + PRINT, first=first, path=path)

    assert all(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("library", CHECKS)
def test_availability_check_says_no_without_halfbyte_and_bitsandbytes(python, hidden, library):
    """Else the test above would prove nothing."""
    need(library)

    done = python(hidden + CHECKS[library] + PRINT)

    assert not any(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("library", CHECKS)
def test_answer_given_before_is_asked_again(python, hidden, library):
    need(library)
    checks = CHECKS[library]

    code = f"{hidden}{checks}\nbefore = checks\nimport halfbyte.compat.bitsandbytes\n{checks}{PRINT}"
    done = python(code + "\nprint(json.dumps(before))")

    after, before = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert not any(before)
    assert all(after)


def test_peft_imported_before_gets_the_module(python, hidden):
    need("peft")
    code = """
import peft.helpers
before = peft.helpers.bnb
import halfbyte.compat.bitsandbytes
import bitsandbytes
print(before, peft.helpers.bnb is bitsandbytes)
"""
    assert python(hidden + code).stdout.splitlines()[-1] == "None True"


def test_integration_of_transformers_imported_before_gets_the_module(python, hidden):
    need("transformers")
    code = """
import transformers.integrations.bitsandbytes as integration
before = hasattr(integration, "bnb")
import halfbyte.compat.bitsandbytes
import bitsandbytes
print(before, integration.bnb is bitsandbytes)
"""
    assert python(hidden + code).stdout.splitlines()[-1] == "False True"


@pytest.mark.parametrize("name", repairs.IMPORTERS)
def test_module_that_looked_in_vain_gets_the_module_and_a_full_one_keeps_its_own(monkeypatch, name):
    mine, none, missing, full = ModuleType("bitsandbytes"), ModuleType(name), ModuleType(name), ModuleType(name)
    none.bnb, full.bnb = None, "something else"
    for module in (none, missing, full):
        monkeypatch.setitem(sys.modules, name, module)
        repairs.apply(mine)

    assert (none.bnb, missing.bnb, full.bnb) == (mine, mine, "something else")


@pytest.mark.parametrize("available", [True, False])
def test_diffusers_imported_before_is_an_error_where_it_decided_against_bitsandbytes(python, available):
    code = f"""
        import sys
        from types import ModuleType
        module = sys.modules["diffusers.utils.import_utils"] = ModuleType("diffusers.utils.import_utils")
        module.is_bitsandbytes_available = lambda: {available}
        try:
            import halfbyte.compat.bitsandbytes
        except ImportError as error:
            print(error)
        print("halfbyte_boot.finder" in sys.modules)  # not activated
    """
    *said, active = python(code).stdout.splitlines()

    assert active == str(available)
    assert said == [] if available else said[0].startswith("diffusers was imported before halfbyte took bitsandbytes'")
    assert available or "set HALFBYTE_BITSANDBYTES=1" in said[0]


def source(module: str) -> str:
    """Its text, without importing it or what is around it."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent.joinpath(*parts).with_suffix(".py").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", repairs.ANSWERS)
def test_functions_that_keep_their_answer_are_still_there(module):
    text = source(module)

    assert [name for name in repairs.ANSWERS[module] if f"def {name}(" not in text] == []


@pytest.mark.parametrize("module", repairs.IMPORTERS)
def test_modules_that_import_bitsandbytes_are_still_there(module):
    assert "import bitsandbytes as bnb" in source(module)
