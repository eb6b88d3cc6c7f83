"""Importing halfbyte is quick, silent and touches no device."""

import ast
import importlib.util
import json
import statistics
from pathlib import Path

import pytest

LIMIT_MS = 150  # against gross regressions; the aim is 60, printed beside what was measured (pytest -rP)


WATCH = """
    import json, random, sys, threading
    import numpy, torch

    def settings():
        return [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
                torch.get_rng_state().sum().item(), torch.get_float32_matmul_precision(),
                torch.are_deterministic_algorithms_enabled(), random.getstate()[1][:3],
                numpy.random.get_state()[1][0].item()]

    def modules():
        return set(sys.modules)

    processes = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec")
    seen = []
    sys.addaudithook(lambda event, args: seen.append(event))
    before, threads, loaded = settings(), threading.active_count(), modules()
    import halfbyte
    halfbyte.active()
    events = list(seen)
    print(json.dumps({
        "settings kept": settings() == before,
        "threads": threading.active_count() - threads,
        "processes": [event for event in events if event in processes],
        "connections": [event for event in events if event.startswith(("socket.", "urllib."))],
        "modules": sorted(modules() - loaded),
    }))
"""


@pytest.fixture(scope="module")
def watched(python):
    """What an import did to a fresh interpreter that already had torch."""
    return json.loads(python(WATCH).stdout)


@pytest.mark.parametrize(
    "package",
    ["transformers", "rich", "safetensors", "triton", "bitsandbytes", "peft", "accelerate", "scipy", "asyncio"],
)
def test_import_brings_nothing_heavy(watched, package):
    assert package not in {name.split(".")[0] for name in watched["modules"]}


@pytest.mark.parametrize("part", ["torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.onnx"])
def test_import_brings_no_further_part_of_torch(watched, part):
    assert not [name for name in watched["modules"] if name.startswith(part)]


def test_import_starts_no_process_and_no_thread(watched):  # bitsandbytes bug 20
    assert watched["processes"] == []
    assert watched["threads"] == 0


def test_import_opens_no_network_connection(watched):  # bitsandbytes bug 20
    assert watched["connections"] == []


def test_import_leaves_torch_as_it_was(watched):
    assert watched["settings kept"]


def test_import_is_silent(python):
    done = python("import halfbyte; halfbyte.active()", flags=("-W", "error"))

    assert done.stdout == ""
    assert done.stderr == "" or "quarantined" in done.stderr  # a backend that is not installed is logged


def test_import_and_ops_work_with_every_built_in_backend_broken(python):  # bitsandbytes bug 20
    done = python(
        """
        import sys
        class Broken:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name.endswith(".plugin") and name.startswith("halfbyte_"):
                    raise OSError("libacme.so.1 is missing")
        sys.meta_path.insert(0, Broken)
        import torch
        import halfbyte
        from halfbyte import functional, plugins
        codes, state = functional.quantize_4bit(torch.ones(64))
        print(functional.dequantize_4bit(codes, state).tolist() == [1.0] * 64, halfbyte.active())
        reasons = {info.name: info.reasons for info in halfbyte.backends()}
        print({reasons[name] for name in plugins.BUILTIN})
        """,
        HALFBYTE_PLUGINS="none",
        CUDA_VISIBLE_DEVICES="",
    )

    assert done.stdout.splitlines() == [
        "True {'cpu': 'reference'}",
        "{('quarantined: OSError: libacme.so.1 is missing',)}",
    ]


def test_import_creates_no_device_context(python):
    """torch.cuda.is_available() would spoil fork(): even a look at a device is refused here."""
    done = python(
        """
        import torch
        def refuse(*args, **kwargs):
            raise AssertionError("a device was touched")
        for module in (torch.cuda, torch.xpu):
            for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "synchronize",
                         "get_device_properties", "get_device_capability", "get_device_name"):
                setattr(module, name, refuse)
        import halfbyte
        print(halfbyte.active()["cpu"] in ("cpu", "reference"), halfbyte.backends() != [])
        print(torch.cuda.is_initialized())
        """
    )

    assert done.stdout == "True True\nFalse\n"


def test_import_of_any_submodule_first_and_use_after_a_fork_work(python):
    modules = ("formats", "ops", "functional", "quant_state", "dispatch", "kernel", "backend", "op", "errors", "nn")
    code = """
        import importlib, os, torch
        for name in {modules!r}:
            child = os.fork()
            if child == 0:
                importlib.import_module("halfbyte." + name)
                os._exit(0)
            print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        import halfbyte.functional
        child = os.fork()
        if child == 0:
            halfbyte.functional.quantize_4bit(torch.ones(64))
            os._exit(0)
        print("after a fork", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = python(code.format(modules=modules), check=False)

    assert done.stdout.split("\n")[:-1] == [f"{name} 0" for name in (*modules, "after a fork")]


def test_public_names_exist_and_are_sorted():
    import halfbyte

    assert halfbyte.__all__ == sorted(halfbyte.__all__)
    for name in halfbyte.__all__:
        assert getattr(halfbyte, name) is not None


def test_leaf_modules_need_no_more_of_halfbyte(python):
    """What plugins import must not depend on the rest; the package itself comes along, so the sources are read."""

    def imports(module):
        tree = ast.parse(Path(importlib.util.find_spec(f"halfbyte.{module}").origin).read_text())
        return {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}

    assert imports("kernel") == set()
    assert imports("op") == set()
    assert imports("backend") == {"kernel"}


@pytest.mark.timeout(120)
def test_import_cost(python, capsys):
    """Milliseconds over `import torch`, the median of interleaved runs."""
    code = """
        import time
        import torch
        begin = time.perf_counter()
        import halfbyte
        print((time.perf_counter() - begin) * 1e3)
    """
    # With bytecode, as for an installed package: the first run may write it, and does not count.
    costs = [float(python(code, PYTHONDONTWRITEBYTECODE="").stdout) for _ in range(4)]

    median = statistics.median(costs[1:])
    with capsys.disabled():
        print(f"\nimport halfbyte: {median:.0f} ms over import torch (aim: 60)")
    assert median < LIMIT_MS
