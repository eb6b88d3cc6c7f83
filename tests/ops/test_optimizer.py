"""The optimizer updates: their mathematics in float64, the rules for awkward values, and what they refuse."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import halfbyte
from halfbyte import formats
from halfbyte.calling import planned as callers
from halfbyte.ops import optimizer as ops
from halfbyte.ops import rules
from halfbyte.testing import cases

CPU = torch.device("cpu")
SIGNED, UNSIGNED = (formats.codebook(name, CPU) for name in ("dynamic", "dynamic_unsigned"))
BETAS = {
    "adam": (0.9, 0.999, 0.0),
    "ademamix": (0.9, 0.999, 0.9999),
    "lion": (0.9, 0.99, 0.0),
    "momentum": (0.9, 0.0, 0.0),
    "rmsprop": (0.99, 0.0, 0.0),
    "adagrad": (0.0, 0.0, 0.0),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclasses.dataclass
class Hyper:
    """The arguments behind the states, with defaults."""

    step: float = 3
    lr: float = 0.01
    grad_scale: float | None = None
    betas: tuple[float, ...] = (0.9, 0.999, 0.9999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    alpha: float = 5.0
    t_alpha: int = 0
    t_beta3: int = 0
    max_unorm: float = 0.0
    skip_zeros: bool = False
    seeds: tuple[int, ...] = ()

    def args(self) -> tuple[Any, ...]:
        scale = None if self.grad_scale is None else torch.tensor(self.grad_scale)
        return (
            torch.tensor(self.step),
            torch.tensor(self.lr, dtype=torch.float64),
            scale,
            list(self.betas),
            *(self.eps, self.weight_decay, self.alpha, self.t_alpha, self.t_beta3, self.max_unorm, self.skip_zeros),
            list(self.seeds),
        )


class One:
    """One parameter with both kinds of states, and what moves it."""

    def __init__(self, optimizer: str, param: torch.Tensor, blocksize: int = 256) -> None:
        first, second = rules.RULES[optimizer].states
        n, blocks = param.numel(), -(-param.numel() // blocksize)
        self.optimizer, self.blocksize, self.param = optimizer, blocksize, param.clone()
        self.state1, self.state2 = torch.zeros(first * n), [torch.zeros(n)] * second
        self.codes1 = torch.zeros(first * n, dtype=torch.uint8)
        self.absmax1 = torch.zeros(first * blocks)
        self.codes2 = [torch.zeros(n, dtype=torch.uint8)] * second
        self.absmax2 = [torch.zeros(blocks)] * second

    def step32(self, grad: torch.Tensor, hyper: Hyper) -> torch.Tensor:
        torch.ops.halfbyte.update_32bit(self.optimizer, [self.param], [grad], [self.state1], self.state2, *hyper.args())
        return self.param

    def step8(self, grad: torch.Tensor, hyper: Hyper) -> torch.Tensor:
        second = UNSIGNED if self.codes2 else None
        states = ([self.codes1], [self.absmax1], SIGNED, self.codes2, self.absmax2, second, self.blocksize)
        torch.ops.halfbyte.update_8bit(self.optimizer, [self.param], [grad], *states, *hyper.args())
        return self.param

    def decoded(self) -> torch.Tensor:
        return SIGNED[self.codes1.long()] * self.absmax1.repeat_interleave(self.blocksize)[: self.codes1.numel()]


def in_float64(optimizer: str, p: torch.Tensor, grads: list[torch.Tensor], hyper: Hyper) -> torch.Tensor:
    """The documented formulas, straight, in float64, over steps 1, 2, ..."""
    p = p.double()
    m = slow = v = torch.zeros_like(p)
    b1, b2, b3 = hyper.betas
    for t, grad in enumerate(grads, 1):
        g = grad.double() * (1 if hyper.grad_scale is None else hyper.grad_scale)
        c1, c2 = 1 - b1**t, math.sqrt(1 - b2**t)
        if optimizer in ("adam", "ademamix", "lion"):
            p = p * (1 - hyper.lr * hyper.weight_decay)
        else:
            g = g + hyper.weight_decay * p
        if optimizer == "adam":
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            u = (m / c1) / (v.sqrt() / c2 + hyper.eps)
        elif optimizer == "ademamix":
            m, slow = b1 * m + (1 - b1) * g, b3 * slow + (1 - b3) * g
            v = b2 * v + (1 - b2) * g * g
            u = (m / c1 + hyper.alpha * slow) / (v.sqrt() / c2 + hyper.eps)
        elif optimizer == "lion":
            u, m = torch.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g
        elif optimizer == "momentum":
            m = g if t == 1 else b1 * m + g
            u = m
        else:
            v = b1 * v + (1 - b1) * g * g if optimizer == "rmsprop" else v + g * g
            u = g / (v.sqrt() + hyper.eps)
        p = p - hyper.lr * u
    return p


@pytest.mark.parametrize("optimizer", rules.RULES)
@given(
    lr=st.floats(1e-5, 0.1),
    weight_decay=st.sampled_from([0.0, 1e-4, 0.1, 0.5]),
    beta=st.floats(0.5, 0.99),
    eps=st.sampled_from([1e-12, 1e-8, 1e-3]),
    scale=st.sampled_from([None, 0.25, 3.0]),
    n=st.integers(1, 700),
    steps=st.integers(1, 4),
)
def test_update_32bit_equals_the_formulas_in_float64(
    backend: str,
    optimizer: str,
    lr: float,
    weight_decay: float,
    beta: float,
    eps: float,
    scale: Any,
    n: int,
    steps: int,
) -> None:
    p, grads = randn(n), [randn(n, seed=t) + 0.1 for t in range(1, steps + 1)]
    betas = (0.0 if optimizer == "adagrad" else beta, 0.99, 0.999)
    hyper = Hyper(1, lr, scale, betas, eps, weight_decay)
    one = One(optimizer, p)

    for t, grad in enumerate(grads, 1):
        one.step32(grad, dataclasses.replace(hyper, step=t))

    want = in_float64(optimizer, p, grads, hyper)
    if optimizer == "lion":  # where the sum is close to zero its sign may differ
        assert (one.param - want).abs().gt(1e-5).float().mean() < 0.01
    else:
        # A gradient that nearly cancels the momentum leaves few digits of it.
        torch.testing.assert_close(one.param.double(), want, rtol=2e-5, atol=2e-5 * max(1, 60 * lr))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", rules.RULES)
def test_parameter_is_rounded_once(backend: str, optimizer: str, dtype: torch.dtype) -> None:
    """bitsandbytes bug 4, 6: decay, gradient scale and small steps rounded to the parameter's dtype on the way."""
    p, grad = randn(999, dtype=dtype), randn(999, seed=1, dtype=dtype)
    hyper = Hyper(1, 1.5e-3, 0.3, BETAS[optimizer], weight_decay=0.9)
    wide, narrow = One(optimizer, p.float()), One(optimizer, p)
    wide.step32(grad.float(), hyper)

    narrow.step32(grad, hyper)

    assert torch.equal(narrow.param, wide.param.to(dtype))
    assert torch.equal(narrow.state1, wide.state1)


@pytest.mark.parametrize("optimizer", rules.RULES)
def test_first_8bit_step_moves_the_parameter_as_the_32bit_one(backend: str, optimizer: str) -> None:
    """The states are zero before, and the new ones are used before they are quantized (bitsandbytes bug 5)."""
    p, grad = randn(5000), randn(5000, seed=1)
    hyper = Hyper(1, betas=BETAS[optimizer], grad_scale=0.5)

    assert torch.equal(One(optimizer, p).step8(grad, hyper), One(optimizer, p).step32(grad, hyper))


@pytest.mark.parametrize("optimizer", ["adam", "lion", "momentum", "ademamix"])
def test_codes_are_those_of_the_nearest_level(backend: str, optimizer: str) -> None:
    n = 4396  # not a multiple of 256: bitsandbytes bug 8
    grad = randn(n, seed=1) * 10 ** randn(n, seed=2)
    exact, coded = One(optimizer, randn(n)), One(optimizer, randn(n))
    exact.step32(grad, Hyper(1, betas=BETAS[optimizer]))
    coded.step8(grad, Hyper(1, betas=BETAS[optimizer]))

    rows = rules.RULES[optimizer].states[0]
    for state, codes, absmax in zip(
        exact.state1.view(rows, n), coded.codes1.view(rows, n), coded.absmax1.view(rows, -1)
    ):
        scale = absmax.repeat_interleave(256)[:n]
        assert torch.equal(absmax[-1], state[n // 256 * 256 :].abs().max())
        distance = (SIGNED.double()[None, :] - (state.double() / scale)[:, None]).abs()
        chosen = distance.gather(1, codes.long()[:, None])[:, 0]
        nudged = (state < 0) & (codes == 126)  # rather too large than without its sign
        assert (chosen - distance.min(1).values)[~nudged].max() < 1e-7
        assert ((SIGNED[codes.long()] < 0) == (state < 0)).all()


def test_tiny_state_keeps_its_sign_and_zero_stays_zero(backend: str) -> None:
    one = One("momentum", torch.zeros(256))
    grad = torch.zeros(256)
    grad[:4] = torch.tensor([1.0, 1e-9, -1e-9, -0.0])

    one.step8(grad, Hyper(1, betas=BETAS["momentum"], weight_decay=0.0))

    assert one.codes1[:5].tolist() == [255, 127, 126, 127, 127]


@pytest.mark.parametrize(("optimizer", "first", "second"), [("adam", 127, 0), ("rmsprop", 127, None)])
def test_block_of_zeros_has_the_codes_of_zero(backend: str, optimizer: str, first: int, second: int | None) -> None:
    one = One(optimizer, torch.zeros(300))
    one.step8(torch.zeros(300), Hyper(1, betas=BETAS[optimizer]))

    assert one.codes1.unique().tolist() == [first]
    assert [codes.unique().tolist() for codes in one.codes2] == ([] if second is None else [[second]])
    assert one.absmax1.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("optimizer", "value"),
    [
        (name, value)
        for name in rules.RULES
        for value in (math.nan, math.inf, -math.inf, 1e30)
        if value != 1e30 or name not in ("lion", "momentum")  # those square nothing
    ],
)
def test_8bit_update_skips_what_is_not_finite(backend: str, optimizer: str, value: float) -> None:
    """bitsandbytes bug 7: one such gradient spreads over its block.  1e30 overflows when it is squared."""
    p, grad = randn(600), randn(600, seed=1)
    hyper = Hyper(1, betas=BETAS[optimizer])
    bad = grad.clone()
    bad[300] = value
    clean = grad.clone()
    clean[300] = 0.0
    one, other = One(optimizer, p), One(optimizer, p)
    one.step8(bad, hyper)
    other.step8(clean, dataclasses.replace(hyper, skip_zeros=True))

    assert one.param[300] == p[300]
    assert torch.equal(one.param, other.param)
    assert torch.equal(one.decoded(), other.decoded())
    assert one.decoded().isfinite().all()


@pytest.mark.parametrize("optimizer", rules.RULES)
def test_32bit_update_keeps_nan_in_its_element(backend: str, optimizer: str) -> None:
    p, grad = randn(600), randn(600, seed=1)
    bad = grad.clone()
    bad[300] = math.nan
    hyper = Hyper(1, betas=BETAS[optimizer])

    found, clean = One(optimizer, p).step32(bad, hyper), One(optimizer, p).step32(grad, hyper)

    assert found.isnan().nonzero().flatten().tolist() == [300]
    assert torch.equal(found[:300], clean[:300])
    assert torch.equal(found[301:], clean[301:])


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("optimizer", rules.RULES)
def test_skip_zeros_leaves_parameter_and_state_alone(backend: str, optimizer: str, bits: int) -> None:
    p = randn(500)
    one = One(optimizer, p)
    step = one.step8 if bits == 8 else one.step32
    step(torch.ones(500), Hyper(1, betas=BETAS[optimizer], skip_zeros=True))
    before, decoded, state = one.param.clone(), one.decoded(), one.state1.clone()

    step(torch.zeros(500), Hyper(2, betas=BETAS[optimizer], skip_zeros=True))

    assert torch.equal(one.param, before)
    assert torch.equal(one.decoded(), decoded)
    assert torch.equal(one.state1, state)


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "rmsprop"])
def test_trust_factor_bounds_the_step(backend: str, optimizer: str) -> None:
    """LAMB's step at t = 1 has the corrected update's norm (bitsandbytes bug 11); it is shrunk, never stretched."""
    p, grad = randn(3000), randn(3000, seed=1)
    hyper = Hyper(1, 0.1, betas=BETAS[optimizer], weight_decay=0.0)
    free = One(optimizer, p).step32(grad, hyper) - p

    bound = One(optimizer, p).step32(grad, dataclasses.replace(hyper, max_unorm=0.01)) - p
    loose = One(optimizer, p).step32(grad, dataclasses.replace(hyper, max_unorm=1e6)) - p

    torch.testing.assert_close(bound.norm(), 0.1 * 0.01 * p.norm(), rtol=1e-3, atol=0)
    assert torch.equal(loose, free)
    zero = One(optimizer, torch.zeros(3000)).step32(grad, dataclasses.replace(hyper, max_unorm=0.01))
    assert zero.abs().max() > 0


def test_stochastic_rounding_has_the_exact_mean_and_repeats(backend: str) -> None:
    n = 200_000
    p = torch.full((n,), 1.0).bfloat16()
    hyper = Hyper(1, 1e-3, betas=BETAS["momentum"], weight_decay=0.0, seeds=(7,))
    grad = torch.ones(n).bfloat16()

    found = One("momentum", p).step32(grad, hyper)

    assert set(found.unique().tolist()) == {1.0, 0.99609375}
    assert abs(found.double().mean() - 0.999) < 3e-5
    assert torch.equal(found, One("momentum", p).step32(grad, hyper))
    assert not torch.equal(found, One("momentum", p).step32(grad, dataclasses.replace(hyper, seeds=(8,))))
    assert One("momentum", p).step32(grad, dataclasses.replace(hyper, seeds=())).unique().tolist() == [1.0]


def test_schedules_of_ademamix_reach_their_end(backend: str) -> None:
    at = [
        rules.coefficients("ademamix", step, 0.1, rules.Hyper((0.9, 0.999, 0.9999), 1e-8, 0.0, 5.0, 100, 100))
        for step in (1, 50, 100, 1000)
    ]

    assert [round(float(c.alpha), 9) for c in at] == [0.05, 2.5, 5.0, 5.0]
    assert 0.9 < at[0].beta3 < at[1].beta3 < at[2].beta3 == at[3].beta3 == 0.9999


@pytest.mark.parametrize("optimizer", rules.RULES)
def test_coefficients_are_the_same_from_tensors(optimizer: str) -> None:
    """On an accelerator step and learning rate stay tensors, so that a graph can capture the step."""
    hyper = rules.Hyper(BETAS[optimizer], 1e-8, 0.1, 5.0, 100, 100 if optimizer == "ademamix" else 0)
    for step in (1.0, 7.0, 500.0):
        plain = rules.coefficients(optimizer, step, 0.01, hyper)
        tensors = rules.coefficients(
            optimizer, torch.tensor(step, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64), hyper
        )
        assert [float(one) for one in tensors] == pytest.approx(list(plain), rel=1e-14)


@pytest.mark.parametrize("name", ["update_32bit", "update_8bit"])
def test_many_tensors_are_one_call_and_equal_single_ones(backend: str, name: str) -> None:
    sizes = [1, 255, 256, 257, 40000, 3]
    hyper = Hyper(2, betas=BETAS["adam"])
    alone = [One("adam", randn(n, seed=n)) for n in sizes]
    together = [One("adam", randn(n, seed=n)) for n in sizes]
    grads = [randn(n, seed=n + 1) for n in sizes]
    for one, grad in zip(alone, grads):
        one.step32(grad, hyper) if name == "update_32bit" else one.step8(grad, hyper)
    lists = {key: [getattr(one, key) for one in together] for key in ("param", "state1", "codes1", "absmax1")}
    pairs = {key: [getattr(one, key)[0] for one in together] for key in ("state2", "codes2", "absmax2")}

    if name == "update_32bit":
        torch.ops.halfbyte.update_32bit("adam", lists["param"], grads, lists["state1"], pairs["state2"], *hyper.args())
    else:
        states = (lists["codes1"], lists["absmax1"], SIGNED, pairs["codes2"], pairs["absmax2"], UNSIGNED, 256)
        torch.ops.halfbyte.update_8bit("adam", lists["param"], grads, *states, *hyper.args())

    for one, other in zip(alone, together):
        assert torch.equal(one.param, other.param)
        assert torch.equal(one.codes1, other.codes1)
        assert torch.equal(one.state2[0], other.state2[0])


# -- bad input -----------------------------------------------------------------------------------------------


def good(name: str) -> list[Any]:
    one = One("adam", randn(300))
    head = ["adam", [one.param], [randn(300)]]
    if name == "update_32bit":
        return [*head, [one.state1], one.state2, *Hyper().args()]
    states = ([one.codes1], [one.absmax1], SIGNED, one.codes2, one.absmax2, UNSIGNED, 256)
    return [*head, *states, *Hyper().args()]


BAD = {
    "optimizer must be one of adam, ademamix": {0: "adamw"},
    "params must have at least one tensor": {1: [], 2: []},
    "grads must have one tensor per parameter, 1; got 2": {2: [randn(300), randn(300)]},
    "a gradient must have its parameter's shape \\(300,\\); got \\(299,\\)": {2: [randn(299)]},
    "params and grads must be of one dtype": {2: [randn(300).half()]},
    "params must be float32, float16, bfloat16; got float64": {1: [randn(300).double()], 2: [randn(300).double()]},
    "params must be contiguous": {1: [randn(300, 2)[:, 0]]},
    "params and grads must be on one device; got cpu and meta": {2: [randn(300).to("meta")]},
    "state1 must have 300 elements; got 299": {3: [torch.zeros(299)]},
    "state1 must have 1 tensors for 1 parameters; got 0": {3: []},
}
BAD_REST = {
    "step must have one element": {0: torch.ones(2)},
    "lr must be on the CPU or on cpu; it is on meta": {1: torch.ones((), device="meta")},
    "betas must be three numbers from 0 to below 1; got \\[0.9, 0.99\\]": {3: [0.9, 0.99]},
    "betas must be three numbers from 0 to below 1; got \\[1.0, 0.9, 0.9\\]": {3: [1.0, 0.9, 0.9]},
    "t_beta3 lets beta3 rise from beta1": {3: [0.0, 0.9, 0.9], 8: 10},
    "max_unorm must be 0, or positive for adam, momentum, rmsprop; got -1.0": {9: -1.0},
    "seeds must be empty, or one per bfloat16 parameter": {11: [1]},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_tensors_are_refused_and_nothing_moves(sentence: str) -> None:
    args = good("update_32bit")
    for place, value in BAD[sentence].items():
        args[place] = value
    before = [param.clone() for param in args[1] if not param.is_meta]

    with pytest.raises(halfbyte.InputError, match=sentence):
        callers["update_32bit"](*args)

    assert all(torch.equal(one, other) for one, other in zip(before, args[1]))


@pytest.mark.parametrize("name", ["update_32bit", "update_8bit"])
@pytest.mark.parametrize("sentence", BAD_REST)
def test_bad_numbers_are_refused(name: str, sentence: str) -> None:
    args = good(name)
    for place, value in BAD_REST[sentence].items():
        args[place + (5 if name == "update_32bit" else 10)] = value

    with pytest.raises(halfbyte.InputError, match=sentence):
        callers[name](*args)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (3, [torch.zeros(300)], "state1 must be torch.uint8 on cpu"),
        (4, [torch.zeros(1)], "absmax1 must have shape \\(2,\\); got \\(1,\\)"),
        (4, [torch.zeros(2).half()], "absmax1 must be torch.float32 on cpu"),
        (5, torch.zeros(255), "codebook1 must have 256 float32 entries"),
        (8, None, "codebook2 must have 256 float32 entries"),
        (6, [], "state2 must have 1 tensors for 1 parameters; got 0"),
        (9, 0, "blocksize must be at least 1; got 0"),
    ],
)
def test_bad_8bit_states_are_refused(place: int, value: Any, sentence: str) -> None:
    args = good("update_8bit")
    args[place] = value

    with pytest.raises(halfbyte.InputError, match=sentence):
        torch.ops.halfbyte.update_8bit(*args)


def test_transforms_over_listed_tensors_are_refused() -> None:
    args = good("update_32bit")

    with pytest.raises(halfbyte.InputError, match="update_32bit cannot run inside"):
        torch.func.vmap(lambda grad: torch.ops.halfbyte.update_32bit(*args[:2], [grad], *args[3:]))(randn(2, 300))


def test_updates_write_what_the_schema_says() -> None:
    assert [[cases.torch_op(op)._schema.arguments[i].name for i in cases.written(op)] for op in ops.OPS] == [
        ["params", "state1", "state2"],
        ["params", "state1", "absmax1", "state2", "absmax2"],
    ]
