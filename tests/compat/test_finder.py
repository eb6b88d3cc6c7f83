"""`import bitsandbytes` is halfbyte: which modules, which metadata, when they are loaded, and what never happens."""

from __future__ import annotations

import json
import sys

import pytest

import halfbyte_boot
from halfbyte_boot.finder import HIDDEN, NAME, SERVED, Finder

NO_WARNINGS = ("-W", "error", "-W", "ignore::DeprecationWarning:torch")


def test_activation_imports_neither_torch_nor_halfbyte(activated):
    code = """
        import importlib.metadata, importlib.util, sys
        importlib.util.find_spec("bitsandbytes"), importlib.metadata.version("bitsandbytes")
        print({"torch", "halfbyte", "bitsandbytes"} & sys.modules.keys())
    """
    assert activated(code).stdout == "set()\n"


def test_module_and_metadata_are_halfbyte_s_whatever_is_installed(activated, installed):
    code = """
        import importlib.metadata, importlib.util, json, sys
        import halfbyte
        spec = importlib.util.find_spec("bitsandbytes")
        versions = [importlib.metadata.version("bitsandbytes"), importlib.metadata.metadata("bitsandbytes")["Version"]]
        import bitsandbytes
        versions += [bitsandbytes.__version__, bitsandbytes.__halfbyte_version__ == halfbyte.__version__]
        print(json.dumps([versions, spec.origin == bitsandbytes.__file__, bitsandbytes.__spec__ is not None,
                          bitsandbytes.nn.Linear4bit is halfbyte.nn.Linear4bit]))
    """
    first, path = installed
    done = activated(code, first=first, path=path)

    assert json.loads(done.stdout) == [["0.50.2", "0.50.2", "0.50.2", True], True, True, True]


@pytest.mark.parametrize("name", ["research", "research.nn", "backends.cuda.ops", "surface"])
def test_part_that_halfbyte_lacks_is_not_found_and_never_falls_through(activated, foreign, name):
    code = f"""
        import sys
        for also in ("", "import bitsandbytes"):
            exec(also)
            try:
                import bitsandbytes.{name}
            except ModuleNotFoundError as error:
                print(error)
        try:
            from bitsandbytes import research
        except ImportError as error:
            print(type(error).__name__)
        print([one for one in sys.modules if one.startswith("bitsandbytes.research")])
    """
    done = activated(code, path=(foreign,))

    said = f"No module named 'bitsandbytes.{name.partition('.')[0]}': halfbyte answers for bitsandbytes here"
    first, second, *rest = done.stdout.splitlines()
    assert first.startswith(said)
    assert second.startswith(said)
    assert rest == ["ImportError", "[]"]


def test_surface_that_cannot_be_imported_is_an_error_and_never_falls_through(activated, foreign):
    code = """
        import sys
        sys.modules["halfbyte.compat.bitsandbytes.surface"] = None
        for _ in range(2):
            try:
                import bitsandbytes
            except ImportError as error:
                print(error, "bitsandbytes" in sys.modules)
    """
    done = activated(code, path=(foreign,))

    assert done.stdout.count("halfbyte.compat.bitsandbytes.surface halted") == done.stdout.count("False") == 2


@pytest.mark.parametrize(
    "imports",
    [
        "import bitsandbytes as bnb; import halfbyte.compat.bitsandbytes as hb",
        "import halfbyte.compat.bitsandbytes as hb; import bitsandbytes as bnb",
        "import halfbyte.compat.bitsandbytes.optim.adamw as hb; import bitsandbytes as bnb",
        "import bitsandbytes.optim.adamw; import bitsandbytes as bnb",
        "from bitsandbytes.nn.modules import Linear4bit; import bitsandbytes as bnb",
    ],
)
def test_each_part_is_one_object_under_both_names(activated, imports):
    code = f"""
        import importlib, pickle, sys
        {imports}
        import halfbyte.compat.bitsandbytes as hb
        assert bnb is hb
        for part in ("nn", "nn.modules", "functional", "optim", "optim.adamw"):
            mine = importlib.import_module("bitsandbytes." + part)
            assert mine is importlib.import_module("halfbyte.compat.bitsandbytes." + part), part
            assert mine is sys.modules["bitsandbytes." + part], part
            assert mine.__spec__.parent == mine.__package__, part
        assert bnb.nn.modules.Linear4bit is bnb.nn.Linear4bit
        assert bnb.optim.adamw.AdamW8bit.__module__ == "bitsandbytes.optim.adamw"
        for one in (bnb.optim.AdamW8bit, bnb.functional.dequantize_4bit, bnb.nn.Params4bit, bnb.matmul_4bit):
            assert pickle.loads(pickle.dumps(one)) is one
        assert pickle.loads(b"cbitsandbytes.nn.modules\\nParams4bit\\n.") is bnb.nn.Params4bit
    """
    activated(code, flags=NO_WARNINGS)


def test_part_is_found_in_sys_modules_right_after_the_import(activated):
    code = """
        import sys
        import bitsandbytes
        print(sys.modules[bitsandbytes.optim.AdamW8bit.__module__].AdamW8bit is bitsandbytes.optim.AdamW8bit)
        from halfbyte_boot.finder import HIDDEN, SERVED
        assert HIDDEN <= sys.modules.keys()
        print([one for one in HIDDEN if one.replace(SERVED, "bitsandbytes") in sys.modules])
    """
    assert activated(code).stdout == "True\n[]\n"


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_module_of_halfbyte_alone_is_not_found(activated, name):
    code = f"""
        try:
            import {name.replace(SERVED, NAME)}
        except ModuleNotFoundError as error:
            print(error.name)
    """
    assert activated(code).stdout == name.replace(SERVED, NAME) + "\n"


def test_patch_of_one_name_is_seen_under_the_other(activated):
    code = """
        import bitsandbytes.functional
        import halfbyte.compat.bitsandbytes.functional as other
        bitsandbytes.functional.dequantize_4bit = "patched"
        print(other.dequantize_4bit)
    """
    assert activated(code).stdout == "patched\n"


def test_reload_keeps_the_module(activated):
    code = """
        import importlib
        import bitsandbytes
        before = bitsandbytes.nn.Linear4bit
        print(importlib.reload(bitsandbytes) is bitsandbytes, bitsandbytes.nn.Linear4bit is before)
    """
    assert activated(code, flags=NO_WARNINGS).stdout == "True True\n"


def test_import_from_many_threads_gives_one_complete_module(activated):
    code = """
        import threading
        barrier, seen = threading.Barrier(8), []

        def load(number):
            barrier.wait()
            if number % 2:
                import bitsandbytes
            else:
                import bitsandbytes.optim.adamw
            seen.append((id(bitsandbytes), hasattr(bitsandbytes, "features"), hasattr(bitsandbytes.optim, "adamw")))

        threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
        [one.start() for one in threads]
        [one.join() for one in threads]
        print(len(seen), len(set(seen)), seen[0][1:])
    """
    assert activated(code).stdout == "8 1 (True, True)\n"


def test_import_starts_no_device_and_brings_no_library_that_imports_it(activated):
    code = """
        import sys
        import bitsandbytes, torch
        print(torch.cuda.is_initialized(), {"transformers", "peft", "accelerate"} & sys.modules.keys())
    """
    assert activated(code).stdout == "False set()\n"


def test_what_callers_read_first_is_there(activated):
    done = activated(
        "import bitsandbytes as b; print('multi_backend' in b.features, 'cpu' in b.supported_torch_devices)"
    )

    assert done.stdout == "True True\n"


# -- activation ----------------------------------------------------------------------------------------------


@pytest.fixture
def finders(monkeypatch):
    """A copy of sys.meta_path, in a process that has imported no bitsandbytes."""
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if not isinstance(one, Finder)])
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    return lambda: [index for index, one in enumerate(sys.meta_path) if isinstance(one, Finder)]


def test_activating_twice_leaves_one_finder_in_front(finders):
    halfbyte_boot.activate()
    mine = sys.meta_path[0]
    halfbyte_boot.activate()
    assert (finders(), sys.meta_path[0]) == ([0], mine)

    sys.meta_path.insert(0, object())
    halfbyte_boot.activate()
    assert (finders(), sys.meta_path[0]) == ([0], mine)


def test_activating_after_a_reload_leaves_one_finder(finders, monkeypatch):
    halfbyte_boot.activate()
    for name in ("halfbyte_boot", "halfbyte_boot.finder"):
        monkeypatch.delitem(sys.modules, name)

    import halfbyte_boot as again

    again.activate()
    assert again is not halfbyte_boot
    assert len([one for one in sys.meta_path if type(one).__name__ == "Finder"]) == 1


@pytest.mark.parametrize("way", ["halfbyte_boot.activate()", "import halfbyte.compat.bitsandbytes"])
def test_activating_after_another_bitsandbytes_is_an_error_that_says_what_to_do(python, foreign, way):
    code = f"""
        import bitsandbytes, halfbyte_boot, sys
        try:
            {way}
        except ImportError as error:
            print(error)
        print([one for one in sys.meta_path if "Finder object" in repr(one) and "boot" in repr(one)])
        import bitsandbytes.research
        print(bitsandbytes.__version__, "halfbyte.compat.bitsandbytes" in sys.modules)
    """
    said, *rest = python(code, path=(foreign,)).stdout.splitlines()

    assert said == (
        f"bitsandbytes is imported already, from {foreign / 'bitsandbytes/__init__.py'}, so halfbyte cannot take its "
        "place any more: set HALFBYTE_BITSANDBYTES=1, or start the script with `halfbyte run`, or import "
        "halfbyte.compat.bitsandbytes before everything else (peft imports bitsandbytes at once, and with it Trainer "
        "and trl)"
    )
    assert rest == ["[]", "0.30.0 False"]


def test_activating_after_halfbyte_s_own_is_no_error(activated):
    assert activated("import bitsandbytes; halfbyte_boot.activate(); print('fine')").stdout == "fine\n"


def test_import_of_the_package_activates(python, foreign):
    code = """
        import halfbyte.compat.bitsandbytes
        import bitsandbytes, importlib.metadata
        print(bitsandbytes.__version__, importlib.metadata.version("bitsandbytes"))
    """
    assert python(code, path=(foreign,)).stdout == "0.50.2 0.50.2\n"


@pytest.mark.parametrize("name", ["bits", "bitsandbytes_extra", "mybitsandbytes", "torch.bitsandbytes"])
def test_other_names_are_left_to_others(name):
    assert Finder().find_spec(name) is None


# -- metadata ------------------------------------------------------------------------------------------------


def names(**asked):
    from importlib.metadata import DistributionFinder

    return [one.metadata["Name"] for one in Finder().find_distributions(DistributionFinder.Context(**asked))]


def test_distribution_is_found_by_name_and_among_all():
    assert names() == names(name="bitsandbytes") == names(name="BitsAndBytes") == ["bitsandbytes"]
    assert names(name="bits-and-bytes") == names(name="halfbyte") == []


def test_distribution_is_not_found_in_a_folder(tmp_path):
    """An installer that looks into site-packages would believe that bitsandbytes is installed."""
    assert names(path=[str(tmp_path)]) == names(name="bitsandbytes", path=[str(tmp_path)]) == []
    assert names(path=sys.path) == ["bitsandbytes"]


def test_distribution_says_who_it_is():
    (one,) = Finder().find_distributions()

    assert one.version == halfbyte_boot.VERSION == "0.50.2"
    assert one.read_text("top_level.txt") == "bitsandbytes\n"
    assert (one.files, one.requires, list(one.entry_points)) == (None, None, [])
    assert "halfbyte" in one.metadata["Summary"]
