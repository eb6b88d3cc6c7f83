"""Weights that serve many calls: a kernel is bound once, to what is there now, and holds nothing alive."""

import gc
import threading
import weakref

import pytest
import torch

import halfbyte
from halfbyte import functional as F
from halfbyte import weights
from halfbyte._runtime import dispatcher
from halfbyte.dispatch import entered

REFERENCE = dispatcher.plugins.ops["linear_4bit"].reference


class Binding:
    """A kernel for linear_4bit that can be bound; counts both ways, and notes the addresses that it was bound to."""

    def __init__(self):
        self.calls = self.bound_calls = 0
        self.bound = []

    def function(self, *args):
        self.calls += 1
        return REFERENCE(*args)

    def bind(self, packed, absmax, *rest):
        self.bound.append((packed.data_ptr(), absmax.data_ptr()))
        plain = rest[3:]

        def product(x, bias, tensors):
            self.bound_calls += 1
            return REFERENCE(x, *tensors, bias, *plain)

        return product

    def kernel(self):
        return halfbyte.Kernel("linear_4bit", self.function, bind=self.bind)


@pytest.fixture
def binding(stub_backend):
    made = Binding()
    stub_backend("acme", kernels=[made.kernel()])
    return made


def weight(nested=False, n=8, k=64):
    packed, state = F.quantize_4bit(torch.randn(n, k), nested=nested)
    return packed, state


def product(x, packed, state):
    return torch.nn.functional.linear(x, F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
def test_a_kernel_is_bound_once_to_a_weight(binding, nested):
    packed, state = weight(nested)
    for rows in (1, 3, 5):
        x = torch.randn(rows, 64)
        assert torch.equal(F.linear_4bit(x, packed, state), product(x, packed, state))
    assert len(binding.bound) == 1
    assert (binding.calls, binding.bound_calls) == (1, 2)


def test_a_kernel_is_bound_again_for_another_dtype_of_x(binding):
    packed, state = weight()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert F.linear_4bit(torch.randn(2, 64, dtype=dtype), packed, state).dtype is dtype
    assert len(binding.bound) == 2


def move(packed, state):
    packed.data = packed.data.flip(0)


def replace_absmax(packed, state):
    state.absmax = 2 * state.absmax


def move_absmax(packed, state):
    state.absmax.data = 2 * state.absmax.data


def move_nested_absmax(packed, state):
    state.state2.absmax.data = 2 * state.state2.absmax.data


def replace_offset(packed, state):
    state.offset = state.offset + 1


def replace_codebook(packed, state):
    state.state2.code = state.state2.code.flip(0)


@pytest.mark.parametrize(
    "change", [move, replace_absmax, move_absmax, move_nested_absmax, replace_offset, replace_codebook]
)
def test_a_changed_weight_is_bound_anew(binding, change):
    packed, state = weight(nested=change not in (move, replace_absmax, move_absmax))
    x = torch.randn(2, 64)
    F.linear_4bit(x, packed, state)
    kept = packed.data, state.absmax, state.state2 and state.state2.absmax.data  # addresses are not given out again

    change(packed, state)

    assert torch.equal(F.linear_4bit(x, packed, state), product(x, packed, state))
    assert len(binding.bound) == 2
    del kept


@pytest.mark.parametrize("change", [torch.t, lambda rows: rows.view(32, 128)])
def test_a_record_ends_when_a_weight_is_turned_or_reshaped_in_place(change):
    rows, absmax = torch.ones(64, 64, dtype=torch.int8), torch.ones(64)
    before = weights.known(rows, rows, absmax)
    assert weights.known(rows, rows, absmax) is before

    rows.data = change(rows.data)

    assert weights.known(rows, rows, absmax) is not before


def test_a_write_into_a_weight_is_seen(binding):
    packed, state = weight()
    x = torch.randn(2, 64)
    F.linear_4bit(x, packed, state)

    packed.zero_()

    assert torch.equal(F.linear_4bit(x, packed, state), product(x, packed, state))
    assert len(binding.bound) == 1


def test_a_smaller_weight_at_the_same_address_is_refused():
    packed, state = weight()
    x = torch.randn(2, 64)
    F.linear_4bit(x, packed, state)

    packed.data = packed.data[:128]

    with pytest.raises(halfbyte.InputError, match="packed must have 256 bytes for 512 elements; got 128"):
        F.linear_4bit(x, packed, state)


@pytest.mark.parametrize("shape", [(8, 32), (8, 128), (16, 64)])
def test_a_weight_is_checked_for_every_shape_that_is_said_of_it(shape):
    packed, state = weight()
    F.linear_4bit(torch.randn(2, 64), packed, state)

    state.shape = torch.Size(shape)

    with pytest.raises(halfbyte.InputError, match=r"packed must have \d+ bytes"):
        F.linear_4bit(torch.randn(2, shape[1]), packed, state)


@pytest.mark.parametrize("bias", [torch.zeros(7), torch.zeros(8, dtype=torch.float16), torch.zeros(8, device="meta")])
def test_a_bias_is_checked_in_every_call(bias):
    packed, state = weight()
    F.linear_4bit(torch.randn(2, 64), packed, state, torch.zeros(8))
    rows, absmax = torch.ones(8, 64, dtype=torch.int8), torch.ones(8)
    F.linear_int8(torch.randn(2, 64), rows, absmax, torch.zeros(8))

    with pytest.raises(halfbyte.InputError):
        F.linear_4bit(torch.randn(2, 64), packed, state, bias)
    with pytest.raises(halfbyte.InputError):
        F.linear_int8(torch.randn(2, 64), rows, absmax, bias)


def test_a_weight_that_is_not_contiguous_is_given_as_it_is(binding):
    packed, state = weight()
    state.absmax = torch.stack((state.absmax, state.absmax), 1)[:, 0]
    x = torch.randn(2, 64)
    for _ in range(2):
        assert torch.equal(F.linear_4bit(x, packed, state), product(x, packed, state))
    assert not binding.bound
    assert binding.calls == 2


def test_a_weight_ends_with_its_last_user_and_its_record_with_it(binding):
    packed, state = weight()
    F.linear_4bit(torch.randn(2, 64), packed, state)
    number, watched = id(packed), weakref.ref(packed)
    assert number in weights._known
    gc.disable()
    try:
        del packed
        assert watched() is None
    finally:
        gc.enable()
    assert number not in weights._known


def test_a_choice_holds_for_weights_that_were_used_before(stub_backend):
    first = stub_backend("acme", ops=("linear_4bit",))
    other = stub_backend("other", ops=("linear_4bit",), priority=-1)
    packed, state = weight()
    x = torch.randn(2, 64)

    def call():
        F.linear_4bit(x, packed, state)

    def elsewhere():
        with halfbyte.use_backend("other"):
            call()

    call()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    call()
    with entered(("other",)):
        call()
    halfbyte.set_backend("other")
    try:
        call()
    finally:
        halfbyte.set_backend(None)
    call()

    assert (len(first.calls), len(other.calls)) == (3, 3)


@pytest.mark.parametrize("can_be_bound", [False, True])
def test_a_kernel_that_fails_at_a_later_call_is_replaced(stub_backend, can_be_bound):
    broken = False

    def function(*args):
        if broken:
            raise halfbyte.KernelUnusable("the device lost it")
        return REFERENCE(*args)

    def bind(*constant):
        return lambda x, bias, tensors: function(x, *tensors, bias, *constant[5:])

    stub_backend("acme", kernels=[halfbyte.Kernel("linear_4bit", function, bind=bind if can_be_bound else None)])
    packed, state = weight()
    x = torch.randn(2, 64)
    for _ in range(2):
        F.linear_4bit(x, packed, state)

    broken = True

    for _ in range(2):
        assert torch.allclose(F.linear_4bit(x, packed, state), product(x, packed, state), atol=1e-5)
    decision = halfbyte.explain("linear_4bit", x, packed, state.absmax, None, None, None, None, "nf4", 64, 8)
    assert decision.backend != "acme"


def test_the_backward_is_bound_too(stub_backend):
    bound = []

    def bind(*constant):
        bound.append(constant[5:])
        return lambda dy, bias, tensors: reference(dy, *tensors, *constant[5:])

    reference = dispatcher.plugins.ops["linear_4bit_backward"].reference
    stub_backend("acme", kernels=[halfbyte.Kernel("linear_4bit_backward", reference, bind=bind)])
    packed, state = weight()
    x = torch.randn(2, 64, requires_grad=True)

    for _ in range(3):
        F.linear_4bit(x, packed, state).sum().backward()

    assert bound == [("nf4", 64, 64)]
    torch.testing.assert_close(x.grad, 3 * F.dequantize_4bit(packed, state).sum(0).expand(2, 64))


def test_a_weight_written_to_between_forward_and_backward_is_an_error():
    packed, state = weight()
    x = torch.randn(2, 64, requires_grad=True)
    y = F.linear_4bit(x, packed, state)

    packed.zero_()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_is_an_error():
    packed, state = weight()
    y = F.linear_4bit(torch.randn(2, 64, requires_grad=True), packed, state).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
