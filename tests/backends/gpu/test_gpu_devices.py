"""On the GPUs at hand, whichever backend serves them: sizes past 2^31, and the second device."""

from __future__ import annotations

import pytest
import torch

import halfbyte
from halfbyte import formats, optim
from halfbyte import functional as F

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA or ROCm device"),
    pytest.mark.filterwarnings("ignore:.*:halfbyte.HalfbytePerformanceWarning"),
]
BF16 = torch.bfloat16
PAST = 2**31 + 4096  # whole blocks; what lies beyond it is where 32 bits would have gone wrong


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    """The same values on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item() < 1e-2


# -- sizes past 2^31 -------------------------------------------------------------------------------------------


@pytest.fixture
def room():
    """`room(20)`: skips where the device has fewer GB free; frees what was taken."""

    def ask(gigabytes):
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of free device memory, {free:.0f} are free")

    torch.cuda.empty_cache()
    yield ask
    torch.cuda.empty_cache()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_past_2_to_the_31_are_quantized_as_by_themselves(room, bits):
    room(25)
    quantize = F.quantize_4bit if bits == 4 else F.quantize_8bit
    dequantize = F.dequantize_4bit if bits == 4 else F.dequantize_8bit
    x = torch.empty(PAST + 77, dtype=BF16, device="cuda").normal_()
    first = PAST - 8192  # on both sides of 2^31
    codes, state = quantize(x)
    alone, alone_state = quantize(x[first:].clone())
    back = dequantize(codes, state)

    assert torch.equal(codes.reshape(-1)[first * bits // 8 :], alone.reshape(-1))
    assert torch.equal(state.absmax[first // state.blocksize :], alone_state.absmax)
    assert torch.equal(back[first:], dequantize(alone, alone_state))


@pytest.mark.parametrize("m", [1, 3, 40, 600])
def test_linear_4bit_takes_a_weight_of_more_than_2_to_the_31_elements(room, m):
    room(12)
    k = 4096
    n = PAST // k + 64
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(n * k // 64, device="cuda")
    x, dy = torch.randn(m, k, device="cuda", dtype=BF16), torch.randn(m, n, device="cuda", dtype=BF16)
    none = (None, None, None)
    y = torch.ops.halfbyte.linear_4bit(x, packed, absmax, *none, None, "nf4", 64, n)
    dx = torch.ops.halfbyte.linear_4bit_backward(dy, packed, absmax, *none, "nf4", 64, k)

    levels = formats.levels("nf4", x.device)
    expected = torch.zeros(m, k, dtype=torch.float64, device="cuda")
    for first in range(0, n, 32768):
        rows = slice(first, min(n, first + 32768))
        bytes_ = packed.view(n, -1)[rows]
        codes = torch.stack((bytes_ >> 4, bytes_ & 15), -1).view(-1, k).int()
        part = levels[codes].double() * absmax.view(n, -1)[rows].double().repeat_interleave(64, 1)
        expected += dy[:, rows].double() @ part
    assert close(y[:, rows], x.double() @ part.T)
    assert close(dx, expected)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_linear_int8_takes_a_weight_of_more_than_2_to_the_31_elements(room, m):
    room(8)
    k = 4096
    n = PAST // k + 64
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    absmax = torch.rand(n, device="cuda")
    x = torch.randn(m, k, device="cuda", dtype=BF16)
    x[:, 5] = 30.0
    y = F.linear_int8(x, weight, absmax, threshold=6.0)

    expected = x.double() @ (weight[-64:].double() * (absmax[-64:] / 127)[:, None]).T
    assert close(y[:, -64:], expected)


def test_rows_past_2_to_the_31_are_quantized_as_by_themselves(room):
    room(12)
    k = 32768
    x = torch.empty(PAST // k + 5, k, dtype=BF16, device="cuda").normal_()
    q, absmax, _ = torch.ops.halfbyte.quantize_int8_rows(x, 0.0)
    alone, alone_absmax, _ = torch.ops.halfbyte.quantize_int8_rows(x[-4:].clone(), 0.0)

    assert torch.equal(q[-4:], alone)
    assert torch.equal(absmax[-4:], alone_absmax)


@pytest.mark.parametrize(("name", "gigabytes"), [("AdamW8bit", 24), ("Lion32bit", 32)])
def test_parameters_past_2_to_the_31_are_updated_as_by_themselves(room, name, gigabytes):
    room(gigabytes)
    whole = torch.nn.Parameter(torch.empty(PAST + 77, dtype=BF16, device="cuda").normal_())
    whole.grad = torch.empty_like(whole).normal_()
    first = PAST - 8192
    part = torch.nn.Parameter(whole.detach()[first:].clone())
    part.grad = whole.grad[first:].clone()
    for param in (whole, part):
        optimizer = getattr(optim, name)([param], lr=0.01)
        for _ in range(2):
            optimizer.step()
        del optimizer

    assert torch.equal(whole[first:], part)


# -- two devices -----------------------------------------------------------------------------------------------

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def everything(device):
    """Results of every op on a device, from the same values."""
    w = randn(640, 1024, dtype=BF16, device=device)
    found = []
    for nested in (False, True):
        packed, state = F.quantize_4bit(w, nested=nested)
        found += [packed, F.dequantize_4bit(packed, state)]
        for m in (1, 12, 40, 600):
            x = randn(m, 1024, dtype=BF16, device=device, seed=m).requires_grad_()
            y = F.linear_4bit(x, packed, state)
            found += [y.detach(), *torch.autograd.grad(y.sum(), x)]
    codes, state = F.quantize_8bit(w)
    found += [codes, F.dequantize_8bit(codes, state)]
    q, absmax, _ = torch.ops.halfbyte.quantize_int8_rows(w, 0.0)
    for m in (1, 12, 40, 600):
        x = randn(m, 1024, dtype=BF16, device=device, seed=m)
        x[:, 3] = 20.0
        found.append(F.linear_int8(x, q, absmax, threshold=6.0))
    for name in ("AdamW8bit", "Lion8bit", "AdEMAMix8bit", "SGD8bit", "AdamW32bit", "PagedAdamW8bit"):
        param = torch.nn.Parameter(w.clone())
        extra = {"momentum": 0.9} if name == "SGD8bit" else {}
        optimizer = getattr(optim, name)([param], lr=0.01, **extra)
        for seed in range(2):
            param.grad = randn(*w.shape, dtype=BF16, device=device, seed=seed)
            optimizer.step()
        found.append(param.detach())
    return found


@two_devices
def test_every_op_gives_the_same_bits_on_the_device_that_is_not_current():
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the two GPUs are different ones")
    here, there = everything("cuda:0"), everything("cuda:1")

    assert torch.cuda.current_device() == 0
    for one, other in zip(here, there, strict=True):
        assert other.device == torch.device("cuda", 1)
        assert torch.equal(one.cpu(), other.cpu())


@two_devices
def test_a_captured_layer_replays_on_the_device_that_it_was_captured_on():
    with torch.cuda.device(1):
        packed, state = F.quantize_4bit(randn(640, 1024, dtype=BF16, device="cuda:1"))
        x = torch.zeros(4, 1024, dtype=BF16, device="cuda:1")
        F.linear_4bit(x, packed, state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = F.linear_4bit(x, packed, state)
    x.copy_(randn(4, 1024))
    torch.cuda.synchronize(1)
    graph.replay()
    torch.cuda.synchronize(1)

    assert torch.equal(y, F.linear_4bit(x, packed, state))


@two_devices
def test_tensors_on_two_devices_are_refused():
    packed, state = F.quantize_4bit(randn(640, 1024, dtype=BF16, device="cuda:1"))
    with pytest.raises(halfbyte.InputError, match="cuda:"):
        F.linear_4bit(torch.zeros(4, 1024, dtype=BF16, device="cuda:0"), packed, state)
