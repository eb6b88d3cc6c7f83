"""Every kernel compiles ahead of time for every arch, and products use the matrix units."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import compiled

from halfbyte import formats
from halfbyte.errors import KernelUnusable
from halfbyte.ops import rules
from halfbyte_triton import eightbit, fourbit, int8, linear4bit, optimizer

CPU = torch.device("cpu")
BOOK = formats.codebook("dynamic", CPU)
UNSIGNED = formats.codebook("dynamic_unsigned", CPU)

# What a product of that arch must contain; tcgen05 is what newer Tritons use on sm_100.
MATRIX = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"mma\.sync|tcgen05\.mma",
    "gfx90a": r"v_mfma",
    "gfx942": r"v_mfma",
    "gfx1100": r"v_wmma",
    "gfx1201": r"v_wmma",
}


def x(m, k=4096, dtype=torch.bfloat16):
    return torch.zeros(m, k, dtype=dtype)


def weight(n=128, k=4096, nested=False, blocksize=64):
    packed, blocks = torch.zeros(n * k // 2, 1, dtype=torch.uint8), n * k // blocksize
    if not nested:
        return packed, torch.zeros(blocks), None, None, None
    return packed, torch.zeros(blocks, dtype=torch.uint8), torch.zeros(blocks // 256), BOOK, torch.zeros(())


def linear(m, dtype=torch.bfloat16, format="nf4", blocksize=64, nested=False, bias=None, k=4096):
    args = (*weight(k=k, nested=nested, blocksize=blocksize), bias, format, blocksize, 128)
    return linear4bit.linear_4bit, x(m, k, dtype), *args


def update(name, eight, *, dtype=torch.bfloat16, trust=0.0, stochastic=False, book=BOOK, n=300_000):
    first, second = rules.RULES[name].states
    like = {"dtype": torch.uint8 if eight else torch.float32}
    state1, state2 = [torch.zeros(first * n, **like)], [torch.zeros(n, **like)] * second
    scales = [torch.zeros(first * -(-n // 256))], [torch.zeros(-(-n // 256))] * second
    states = (state1, scales[0], book, state2, scales[1], UNSIGNED, 256) if eight else (state1, state2)
    hyper = ([0.9, 0.99, 0.999], 1e-8, 0.1, 5.0, 0, 0, trust, False, [3] if stochastic else [])
    p = [torch.zeros(n, dtype=dtype)]
    function = optimizer.update_8bit if eight else optimizer.update_32bit
    return function, name, p, p, *states, torch.tensor(7), torch.tensor(0.01), None, *hyper


PRODUCTS = {
    "linear_4bit-1": linear(1),
    "linear_4bit-16-float16-fp4-nested": linear(16, torch.float16, "fp4", nested=True),
    "linear_4bit-64": linear(64),
    "linear_4bit-200": linear(200, bias=torch.zeros(128, dtype=torch.bfloat16)),
    "matmul_int8-100": (int8.matmul_int8, x(100, dtype=torch.int8), x(128, dtype=torch.int8)),
    "linear_int8-16": (int8.linear_int8, x(16), x(128, dtype=torch.int8), torch.zeros(128), None, 0.0, "exact"),
    "linear_int8-300-outliers": (
        int8.linear_int8,
        x(300),
        x(128, dtype=torch.int8),
        torch.zeros(128),
        None,
        6.0,
        "exact",
    ),
    "linear_int8-1-w8a16": (int8.linear_int8, x(1), x(128, dtype=torch.int8), torch.zeros(128), None, 0.0, "w8a16"),
}
OTHERS = {
    "quantize_4bit-nf4": (fourbit.quantize_4bit, x(64), "nf4", 64),
    "quantize_4bit-fp4-tail": (fourbit.quantize_4bit, x(1, 4077, torch.float32), "fp4", 32),
    "dequantize_4bit": (fourbit.dequantize_4bit, *weight(), "nf4", 64, (128, 4096), torch.bfloat16),
    "dequantize_4bit-nested": (fourbit.dequantize_4bit, *weight(nested=True), "fp4", 64, (128, 4096), torch.float32),
    "linear_4bit-float32": linear(3, torch.float32),
    "quantize_8bit": (eightbit.quantize_8bit, x(64), BOOK, 256),
    "quantize_8bit-unsigned": (eightbit.quantize_8bit, x(64, dtype=torch.float32), UNSIGNED, 256),
    "quantize_8bit-other": (eightbit.quantize_8bit, x(64, dtype=torch.float16), BOOK.clone(), 100),
    "dequantize_8bit": (
        eightbit.dequantize_8bit,
        x(64, dtype=torch.uint8),
        x(64, 16, torch.float32),
        BOOK,
        256,
        torch.half,
    ),
    "quantize_int8_rows": (int8.quantize_int8_rows, x(8), 0.0),
    "quantize_int8_rows-outliers": (int8.quantize_int8_rows, x(8, 20000), 6.0),
    "dequantize_int8": (
        int8.dequantize_int8,
        x(8, dtype=torch.int32),
        torch.zeros(8),
        torch.zeros(4096),
        None,
        torch.half,
    ),
    "update_8bit-adam": update("adam", True),
    "update_8bit-momentum-other-trust": update("momentum", True, trust=0.1, book=BOOK.clone(), dtype=torch.float16),
    "update_8bit-ademamix-stochastic": update("ademamix", True, stochastic=True),
    "update_8bit-lion": update("lion", True, dtype=torch.float32),
    "update_32bit-adam-trust": update("adam", False, trust=0.1),
    "update_32bit-rmsprop": update("rmsprop", False, dtype=torch.float32),
    "linear_int8-float32-w8a16": (
        int8.linear_int8,
        x(1, 64, torch.float32),
        x(8, 64, torch.int8),
        torch.zeros(8),
        None,
        0.0,
        "w8a16",
    ),
}


def code(arch, call):
    """The assembly of every launch of a call."""
    found = compiled.launches(arch, *call)
    assert found
    return [compiled.compile(launch, arch) for launch in found]


@pytest.mark.parametrize("arch", compiled.TARGETS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_compiles_to_matrix_instructions(name, arch):
    texts = [one.get("ptx") or one["amdgcn"] for one in code(arch, PRODUCTS[name])]
    few = name == "linear_4bit-1" and arch == "sm_90"  # whose tile of 8 rows triton 3.6 gives to mma
    wanted = r"mma\.sync|wgmma\.mma_async" if few else MATRIX[arch]

    assert any(re.search(wanted, text) for text in texts), f"no {wanted} in {name} for {arch}"


@pytest.mark.parametrize("arch", compiled.TARGETS)
@pytest.mark.parametrize("name", OTHERS)
def test_kernel_compiles(name, arch):
    for one in code(arch, OTHERS[name]):
        assert one.get("cubin") or one.get("hsaco")


@pytest.fixture
def clean(monkeypatch):
    """The kernel for sm_90 as if it had not been tried."""
    monkeypatch.setattr(linear4bit, "given_up", set())
    linear4bit.specialized.cache_clear()
    yield
    linear4bit.specialized.cache_clear()


def test_kernel_for_sm_90_that_does_not_compile_is_given_up(clean, caplog):
    if linear4bit.specialized("sm_90") is None:
        pytest.skip("the installed triton is older than 3.6")
    tried = []

    def refuse(kernel, *rest, **options):
        tried.append(kernel.__name__)
        if kernel.__name__ == "hopper_kernel":
            raise KernelUnusable("no such instruction")

    function, *args = linear(64)
    with compiled.patched("sm_90", refuse):
        function(*args)
        function(*args)

    assert [one for one in tried if one != "reduce_kernel"] == ["hopper_kernel", "linear_kernel", "linear_kernel"]
    assert [one.getMessage() for one in caplog.records] == ["the kernel for sm_90 is given up: no such instruction"]


@pytest.mark.parametrize(
    "change", [{"dtype": torch.float32}, {"blocksize": 128}, {"format": "fp4", "k": 2176}, {"m": 16}], ids=str
)
def test_kernel_for_sm_90_leaves_other_situations_to_the_other(change):
    function, *args = linear(**{"m": 64, **change})

    assert "hopper_kernel" not in [launch.kernel.__name__ for launch in compiled.launches("sm_90", function, *args)]


def test_step_of_the_host_is_no_pointer_of_a_kernel():
    """Triton refuses a pointer to memory of the host."""
    function, *args = update("adam", True, trust=0.1)
    step = args[-12]
    assert torch.equal(step, torch.tensor(7))

    found = compiled.launches("sm_90", function, *args)
    assert len(found) == 3
    assert not any(one is step for launch in found for one in launch.args)


class HostCopies(TorchFunctionMode):
    """Numbers of the host that are copied to a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        device = torch.device((kwargs or {}).get("device") or CPU)
        if func in (torch.tensor, torch.as_tensor) and device != CPU and not isinstance(args[0], torch.Tensor):
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


def test_step_on_the_device_needs_no_copy_from_the_host(monkeypatch):
    """A CUDA graph cannot capture one of pageable memory."""
    function, *args = update("adam", False)
    meta = pytree.tree_map_only(torch.Tensor, lambda one: one.to("meta"), args)
    table = SimpleNamespace(rows=meta[1][0], parts=meta[1][0], bounds=meta[1][0])  # what is kept between calls
    monkeypatch.setattr(optimizer, "table_of", lambda *key: table)
    copies = HostCopies()
    copies.found = []

    with copies:
        assert len(compiled.launches("sm_90", function, *meta)) == 1
    assert not copies.found


@pytest.mark.parametrize("name", ["update_8bit-adam", "update_8bit-ademamix-stochastic", "update_8bit-lion"])
def test_kept_table_is_read_behind_a_barrier(name):
    """The compiler knows nothing of the area, so nothing but the text keeps the order."""
    text = code("sm_90", OTHERS[name])[0]["ptx"]
    kept = [(found.start(), found.group()) for found in re.finditer(r"halfbyte_kept(?s:.*?)(ld|st)\.shared", text)]
    stores = [place for place, what in kept if what.endswith("st.shared")]
    loads = [place for place, what in kept if what.endswith("ld.shared")]

    assert stores
    assert loads
    assert max(stores) < min(loads)
    assert "bar.sync" in text[max(stores) : min(loads)]
