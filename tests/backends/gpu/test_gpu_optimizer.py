"""The optimizer updates of the portable GPU module, executed at 32 and at 64 lanes, equal the references bit for
bit; the plans of their tensors are kept, renewed and dropped."""

from __future__ import annotations

import gc

import emulated
import pytest
import torch

from halfbyte import formats, native_gpu_optimizer
from halfbyte.ops import optimizer, rules
from halfbyte.testing import samples_optimizer
from halfbyte.testing.draw import Draw

BUILT = [lanes for lanes in emulated.LANES if emulated.module(lanes)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FACTS = {"update_32bit": optimizer.Facts, "update_8bit": optimizer.Facts8bit}
MAKE = {"update_32bit": samples_optimizer.make_32bit, "update_8bit": samples_optimizer.make_8bit}
REFERENCE = {"update_32bit": optimizer.update_32bit, "update_8bit": optimizer.update_8bit}
# Several rounds of a grid; tails of every kind; for AdEMAMix a second half that is aligned, and one that is not.
SIZES = ((20000, 1, 300), (513,), (8192, 64))

pytestmark = pytest.mark.skipif(not BUILT, reason="built without HALFBYTE_EMULATE=ON")


@pytest.fixture(params=emulated.LANES)
def kernel(request):
    """`kernel("update_8bit")`: its function at 32 or 64 lanes."""
    found = {one.op: one.function for one in native_gpu_optimizer.kernels(emulated.module(request.param))}
    return found.__getitem__


def facts_of(op, dtype, name, trust=False, stochastic=False):
    block = {"blocksize": 256} if op == "update_8bit" else {}
    return FACTS[op](torch.device("cpu"), dtype, name, **block, trust=trust, stochastic=stochastic)


def situations(op, name):
    for dtype in DTYPES:
        for trust in (False, True):
            for stochastic in (False, True):
                facts = facts_of(op, dtype, name, trust, stochastic)
                if samples_optimizer.possible(facts):
                    yield facts


def copied(value, copy=torch.clone):
    if isinstance(value, list):
        return [copied(one, copy) for one in value]
    return copy(value) if isinstance(value, torch.Tensor) and value.ndim else value


def on_offset(x):
    """The same values in storage that starts one element off."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    storage[1:] = x.reshape(-1)
    return storage[1:].view(x.shape)


def same(found, expected, summed=False):
    """Equal in every bit but NaN's, in all lists of two calls' arguments.

    summed  a trust factor's norms are added up in another order: parameters may differ by their last bit
    """
    for place, (got, want) in enumerate(zip(found, expected)):
        if isinstance(got, list):
            for one, other in zip(got, want):
                if isinstance(one, torch.Tensor):
                    rtol = torch.finfo(one.dtype).eps if summed and place == 1 else 0
                    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-9 * summed, equal_nan=True)


@pytest.mark.parametrize("name", rules.RULES)
@pytest.mark.parametrize("op", MAKE)
def test_updates_equal_the_reference(kernel, op, name):
    for facts in situations(op, name):
        for size in SIZES:
            for values in ("normal", "nan", "inf"):
                args = MAKE[op](facts, size, Draw(f"{facts} {size}", values))
                found = [copied(one, on_offset if len(size) == 1 else torch.clone) for one in args]
                expected = copied(list(args))
                for step in (1, 2):  # the second from states that the first left
                    found[-12] = expected[-12] = torch.tensor(step)
                    kernel(op)(*found)
                    REFERENCE[op](*expected)
                same(found, expected, summed=facts.trust)


def codebook(kind):
    signed, unsigned = (formats.codebook(name, torch.device("cpu")) for name in formats.codebook_names())
    if kind == "linear":  # levels of -1 and 1
        return torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)
    if kind == "dense":  # two thresholds in a bin
        return torch.cat([signed[:200], torch.linspace(0.23, 0.231, 56)]), torch.linspace(0.5, 0.51, 256)
    if kind == "tiny":  # thresholds below 2^-24
        return signed.sign() * signed.abs() ** 3, unsigned**3
    if kind == "repeated":
        return torch.repeat_interleave(signed[::2], 2), torch.repeat_interleave(unsigned[::2], 2)
    return -signed.flip(0), signed  # no level between 0 and -1e-6; a second one with signs


@pytest.mark.parametrize("kind", ["linear", "dense", "tiny", "repeated", "mirrored"])
def test_update_8bit_takes_any_codebook(kernel, kind):
    for name in ("adam", "lion"):
        args = list(MAKE["update_8bit"](facts_of("update_8bit", torch.float32, name), (5000,), Draw(kind)))
        args[5], second = codebook(kind)
        args[8] = second if args[6] else None
        found, expected = copied(args), copied(args)
        for _ in range(2):
            kernel("update_8bit")(*found)
            REFERENCE["update_8bit"](*expected)
        same(found, expected)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-12, 1e12, 1e30])
def test_update_8bit_rounds_quotients_correctly_at_all_magnitudes(kernel, scale):
    facts = facts_of("update_8bit", torch.float32, "lion")
    args = list(MAKE["update_8bit"](facts, (70000,), Draw("magnitudes")))
    args[2] = [torch.randn(70000, generator=torch.Generator().manual_seed(1)) * scale]
    args[4] = [torch.zeros_like(args[4][0])]  # the state is then rest2 * gradient
    found, expected = copied(args), copied(args)
    kernel("update_8bit")(*found)
    REFERENCE["update_8bit"](*expected)
    same(found, expected)


def test_update_8bit_rounds_ties_like_the_reference(kernel):
    """States that are exactly at, just below and just above every threshold."""
    signed = formats.codebook("dynamic", torch.device("cpu"))
    middles = (signed[:-1] + signed[1:]) * 0.5
    around = [middles, middles.nextafter(torch.tensor(-2.0)), middles.nextafter(torch.tensor(2.0))]
    values = torch.cat([*around, torch.tensor([0.0, -0.0, 1e-45, -1e-45, -1.0])])
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    grad = torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1).reshape(-1)  # the largest of each block is 1
    args = list(MAKE["update_8bit"](facts_of("update_8bit", torch.float32, "momentum"), (len(grad),), Draw("a")))
    args[1], args[2], args[4] = [torch.zeros_like(grad)], [grad], [torch.zeros_like(args[4][0])]
    args[12], args[18], args[20] = None, 0.0, False
    args[15] = 0.0  # weight decay
    found, expected = copied(args), copied(args)
    kernel("update_8bit")(*found)
    REFERENCE["update_8bit"](*expected)
    same(found, expected)
    assert len(found[3][0].unique()) == 256


@pytest.mark.parametrize("op", MAKE)
def test_numbers_on_the_device_give_the_same_update(kernel, op, monkeypatch):
    """What a captured step does: the emulation's device is the host, so where numbers are is played."""
    for name in rules.RULES:
        args = list(MAKE[op](facts_of(op, torch.float32, name), (3000, 40), Draw(name)))
        for step in (1, 60):
            found, expected = copied(args), copied(args)
            found[-12] = expected[-12] = torch.tensor(step)
            kernel(op)(*expected)
            with monkeypatch.context() as patch:
                patch.setattr(native_gpu_optimizer, "on_host", lambda number: False)
                kernel(op)(*found)
            for got, want in zip(found, expected):
                if isinstance(got, list) and got and isinstance(got[0], torch.Tensor):
                    for one, other in zip(got, want):
                        # pow may differ from Python's in the last bit of float64
                        torch.testing.assert_close(one, other, rtol=1e-6, atol=float(one.dtype is torch.uint8))


@pytest.mark.parametrize("op", MAKE)
def test_many_small_tensors_are_one_call(kernel, op):
    size = tuple(1 + 37 * i % 700 for i in range(150))
    args = MAKE[op](facts_of(op, torch.bfloat16, "adam"), size, Draw("many"))
    found, expected = copied(list(args)), copied(list(args))
    kernel(op)(*found)
    REFERENCE[op](*expected)
    same(found, expected)


class Counting:
    """A module that counts the plans it makes."""

    def __init__(self, module):
        self.module, self.plans = module, 0

    def __getattr__(self, name):
        if name == "plan_update":
            self.plans += 1
        return getattr(self.module, name)


def test_a_plan_is_kept_while_every_address_stays():
    module = Counting(emulated.module(32))
    update = {one.op: one.function for one in native_gpu_optimizer.kernels(module)}["update_32bit"]
    args = list(MAKE["update_32bit"](facts_of("update_32bit", torch.float32, "adam"), (300, 40), Draw("plan")))
    gc.collect()
    before = len(native_gpu_optimizer._plans)
    update(*args)
    update(*args)
    assert module.plans == 1
    expected = copied(args)
    args[2] = copied(args[2])  # gradients elsewhere
    args[2][1] *= 2
    expected[2] = copied(args[2])
    update(*args)
    optimizer.update_32bit(*expected)
    same(args, expected)
    assert module.plans == 2
    assert len(native_gpu_optimizer._plans) == before + 1
    del args
    gc.collect()
    assert len(native_gpu_optimizer._plans) == before
