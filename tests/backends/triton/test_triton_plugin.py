"""What the Triton backend says about itself, and what a failed compilation becomes."""

import importlib.metadata
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from halfbyte import DeviceFacts, KernelUnusable, probe
from halfbyte.ops import fourbit
from halfbyte_triton import plugin

CUDA = torch.device("cuda", 0)
T4 = DeviceFacts("cuda", 0, "nvidia", "sm_75", (7, 5), 32, 40, "T4")
V100 = DeviceFacts("cuda", 0, "nvidia", "sm_70", (7, 0), 32, 80, "V100")
MI300 = DeviceFacts("cuda", 0, "amd", "gfx942", None, 64, 304, "MI300X")


@pytest.fixture
def machine(monkeypatch):
    """`machine(triton="3.1.0", cuda="13.0")`: what is installed, without looking."""

    def set(triton, cuda="13.0"):
        spec = None if triton is None else SimpleNamespace(name="triton")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

        def version(name):
            if name != "triton" or triton is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return triton

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return plugin.TritonBackend().why_not()

    return set


def test_machine_with_a_new_enough_triton_and_a_gpu_torch_can_run_it(machine):
    assert machine("3.2.0") == ()
    assert machine("3.10.1+git1234") == ()


def test_each_missing_piece_is_one_reason(machine):
    assert machine(None) == ("triton is not installed",)
    assert machine("3.1.0") == ("needs triton 3.2 or newer, 3.1 is installed",)
    (reason,) = machine("3.6.0", cuda=None)
    assert reason == f"torch {torch.__version__} is built for no GPU"


def test_device_that_is_too_old_gets_a_reason():
    backend = plugin.TritonBackend()

    assert backend.why_not_device(V100) == ("needs sm_75 or newer, cuda:0 is sm_70",)
    assert backend.why_not_device(T4) == backend.why_not_device(MI300) == ()
    assert backend.why_not_device(DeviceFacts("cuda", 0)) == ()  # not known yet


def facts(dtype, blocksize=64):
    return fourbit.QuantizeFacts(CUDA, dtype, "nf4", blocksize)


def test_bfloat16_needs_sm_80(monkeypatch):
    monkeypatch.setattr(probe, "confirmed", lambda device: T4)

    assert plugin._rule(facts(torch.bfloat16)) == ("dtype=bfloat16 needs sm_80 or newer, cuda:0 is sm_75",)
    assert plugin._rule(facts(torch.float16)) == ()
    monkeypatch.setattr(probe, "confirmed", lambda device: MI300)
    assert plugin._rule(facts(torch.bfloat16)) == ()


def test_block_that_no_program_holds_gets_a_reason(monkeypatch):
    monkeypatch.setattr(probe, "confirmed", lambda device: MI300)

    assert plugin._rule(facts(torch.float32, 8193)) == ("blocksize=8193 (takes 1 to 8192)",)


def raising(error):
    def run(*args, **options):
        raise error

    return {(1,): run}


@pytest.mark.parametrize(
    "text",
    ["PassManager::run failed", "Failed to find C compiler.", "Triton Error [CUDA]: device kernel image is invalid"],
)
def test_kernel_that_does_not_compile_is_unusable_with_its_reason(text):
    launch = pytest.importorskip("halfbyte_triton.launch")

    with pytest.raises(KernelUnusable, match=r"^Triton .* cannot compile it: RuntimeError: ") as caught:
        launch.launch(raising(RuntimeError(f"while lowering\n{text}")), (1,), torch.device("cpu"))
    assert text in str(caught.value)


def test_kernel_that_fails_while_it_runs_is_an_error():
    launch = pytest.importorskip("halfbyte_triton.launch")

    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        launch.launch(raising(RuntimeError("Triton Error [CUDA]: an illegal memory access")), (1,), torch.device("cpu"))
    assert not isinstance(caught.value, KernelUnusable)


def test_configurations_are_complete():
    """Every operation has every bucket for any GPU, and a bucket of one arch is one of any."""
    launch = pytest.importorskip("halfbyte_triton.launch")

    tuned = launch.tuned()
    every = tuned["any"]
    assert set(every) == set(tuned["cpu"])
    assert {arch for arch in tuned if "linear_4bit_hopper" in tuned[arch]} == {"sm_90"}
    for operations in tuned.values():
        for operation, buckets in operations.items():
            assert set(buckets) <= set(every[operation.removesuffix("_hopper")]), operation
            for bucket, constants in buckets.items():
                assert all(isinstance(value, int) for value in constants.values()), (operation, bucket)
