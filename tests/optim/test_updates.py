"""Every class takes the step that ops/rules.py describes, here in float64."""

import inspect

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from halfbyte import optim
from halfbyte.ops import rules
from halfbyte.optim import PytorchLARS

CLASSES = [
    name
    for name in optim.__all__
    if inspect.isclass(getattr(optim, name))
    and issubclass(getattr(optim, name), optim.Optimizer)
    and name != "Optimizer"
]
PLAIN = ["Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the parameter after some steps: a few roundings to its dtype.
CLOSE = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-4), torch.bfloat16: (1.6e-2, 1e-3)}

pytestmark = pytest.mark.filterwarnings("ignore:paging to the host:halfbyte.HalfbyteWarning")


def exact(optimizer, param, grads):
    """The parameter after each step, in float64 but rounded to its dtype as the optimizer does."""
    (group,) = optimizer.param_groups
    rule, dtype = rules.RULES[optimizer.rule], param.dtype
    betas = (*group["betas"], 0.0)[:3]
    eps = group["eps"]
    hyper = rules.Hyper(
        betas,
        eps,
        group["weight_decay"],
        group.get("alpha", 0.0),
        group.get("t_alpha") or 0,
        group.get("t_beta3") or 0,
    )
    p = param.detach().double().view(-1)
    states = tuple(torch.zeros_like(p) for _ in range(sum(rule.states)))
    for number, grad in enumerate(grads, start=1):
        c = rules.coefficients(optimizer.rule, number, group["lr"], hyper)
        g = grad.double().view(-1)
        _, p, states = rules.moved(optimizer.rule, c, p, g, states, optimizer.args.max_unorm, eps)
        p = p.to(dtype).double()
    return p.to(dtype).view(param.shape), states


def gradients(shape, dtype, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def run(optimizer, param, grads):
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_class_takes_the_exact_steps_with_32bit_states(build, randn, name, dtype):
    param = randn(9, 5, dtype=dtype)  # below min_8bit_size
    optimizer = build(name, [param])
    grads = gradients((9, 5), dtype)
    expected, states = exact(optimizer, param, grads)

    run(optimizer, param, grads)

    torch.testing.assert_close(param.detach(), expected, rtol=CLOSE[dtype][0], atol=CLOSE[dtype][1])
    state = optimizer.state[param]
    kept = torch.cat([state[key].view(-1) for key in ("state1", "state2") if key in state])
    torch.testing.assert_close(
        kept, torch.cat(states).float(), rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in CLASSES if "8bit" in name])
def test_8bit_class_takes_the_exact_first_step_and_close_ones_after(build, randn, name, dtype):
    param = randn(70, 60, dtype=dtype)
    optimizer = build(name, [param])
    grads = gradients((70, 60), dtype)
    first, _ = exact(optimizer, param, grads[:1])
    third, _ = exact(optimizer, param, grads)
    start = param.detach().clone()

    run(optimizer, param, grads[:1])
    assert optimizer.state[param]["state1"].dtype is torch.uint8
    torch.testing.assert_close(param.detach(), first, rtol=CLOSE[dtype][0], atol=CLOSE[dtype][1])

    run(optimizer, param, grads[1:])
    off = (param.detach().double() - third.double()).norm() / (third.double() - start.double()).norm()
    assert off < 0.1  # the first step is exact, so that the noise of two quantizations remains


@pytest.mark.parametrize("name", CLASSES)
def test_state_has_bitsandbytes_names_dtypes_and_shapes(build, randn, step, name):
    param = randn(70, 60)
    optimizer = build(name, [param])

    step(optimizer, [param])

    state = optimizer.state[param]
    first, second = rules.RULES[optimizer.rule].states
    bits = 8 if "8bit" in name else 32
    wanted = {"step": 1}
    for suffix, count in (("1", first), ("2", second)):
        if count:
            ahead = (2,) if count == 2 else ()
            wanted[f"state{suffix}"] = (torch.uint8 if bits == 8 else torch.float32, (*ahead, 70, 60))
            if bits == 8:
                wanted[f"qmap{suffix}"] = (torch.float32, (256,))
                wanted[f"absmax{suffix}"] = (torch.float32, (*ahead, 17))
    if "LAMB" in name or "LARS" in name:
        wanted["unorm_vec"] = (torch.float32, (1,))
    found = {key: (v.dtype, tuple(v.shape)) if isinstance(v, torch.Tensor) else v for key, v in state.items()}
    assert found == wanted


def test_state_is_8bit_from_min_8bit_size_on(build, randn, step):
    sizes = {4095: torch.float32, 4096: torch.uint8}
    params = [randn(n) for n in sizes]
    optimizer = build("AdamW8bit", params)

    step(optimizer, params)

    assert [optimizer.state[param]["state1"].dtype for param in params] == list(sizes.values())


hypers = st.fixed_dictionaries(
    {"lr": st.floats(1e-6, 1.0), "weight_decay": st.sampled_from([0.0, 0.01, 0.3])},
)
beta = st.floats(0.0, 0.999)


@hypothesis.given(
    name=st.sampled_from(PLAIN),
    hyper=hypers,
    beta1=beta,
    beta2=beta,
    eps=st.floats(1e-10, 1e-2),
    seed=st.integers(0, 99),
)
def test_any_hyperparameters_give_the_exact_steps(build, randn, name, hyper, beta1, beta2, eps, seed):
    param = randn(3, 7, seed=seed)
    arguments = dict(hyper)
    if name in ("Adam", "AdamW", "Lion", "LAMB"):
        arguments["betas"] = (beta1, beta2)
    if name in ("Adam", "AdamW", "LAMB", "AdEMAMix", "RMSprop", "Adagrad"):
        arguments["eps"] = eps
    if name == "AdEMAMix":
        arguments |= {"betas": (max(beta1, 0.1), beta2, 0.9999), "alpha": 3.0, "t_alpha": 5, "t_beta3": 5}
    if name in ("SGD", "LARS"):
        arguments["momentum"] = max(beta1, 0.01)
    optimizer = build(name, [param], **arguments)
    grads = gradients((3, 7), torch.float32, count=4, seed=seed)
    expected, _ = exact(optimizer, param, grads)
    scale = max(1.0, expected.abs().max().item())  # a large lr makes large parameters of small differences

    run(optimizer, param, grads)

    torch.testing.assert_close(param.detach(), expected, rtol=1e-4, atol=2e-5 * scale)


shapes = st.one_of(st.tuples(st.integers(1, 1500)), st.tuples(st.integers(1, 12), st.integers(1, 60)))


@hypothesis.given(name=st.sampled_from(PLAIN), shape=shapes, dtype=st.sampled_from(DTYPES), count=st.integers(1, 5))
def test_any_shape_and_number_of_steps_gives_the_exact_steps(build, randn, name, shape, dtype, count):
    param = randn(*shape, dtype=dtype)
    optimizer = build(name, [param])
    grads = gradients(shape, dtype, count)
    expected, _ = exact(optimizer, param, grads)

    run(optimizer, param, grads)

    # Lion's sign, and a rounding of the parameter, may fall to the other side.
    off = (param.detach().double() - expected.double()).abs() > CLOSE[dtype][1] + CLOSE[dtype][0] * expected.abs()
    assert off.float().mean() < (0.02 if name == "Lion" else 1e-9)


def decoded(optimizer, param):
    """The 8-bit states of a parameter in float64, and beside each its codes, codebook and absmax per element."""
    state = optimizer.state[param]
    found = []
    for suffix, count in zip("12", rules.RULES[optimizer.rule].states, strict=True):
        if count:
            codes = state[f"state{suffix}"].view(count, -1)
            scales = state[f"absmax{suffix}"].view(count, -1).double().repeat_interleave(256, 1)[:, : codes.shape[1]]
            table = state[f"qmap{suffix}"].double()
            found += [(table[one.long()] * scale, one, table, scale) for one, scale in zip(codes, scales, strict=True)]
    return found


@hypothesis.given(
    name=st.sampled_from(PLAIN),
    n=st.integers(1, 1500),
    dtype=st.sampled_from(DTYPES),
    before=st.integers(0, 3),
    hyper=hypers,
    seed=st.integers(0, 99),
)
def test_any_8bit_step_is_the_exact_one_from_its_decoded_states(build, randn, name, n, dtype, before, hyper, seed):
    """The parameter moves by the new states before they are quantized; their codes are those of the nearest level."""
    param = randn(n, seed=seed, dtype=dtype)
    arguments = {**hyper, "lr": min(hyper["lr"], 0.1)}
    optimizer = build(name, [param], optim_bits=8, min_8bit_size=1, **arguments)
    *first, last = gradients((n,), dtype, before + 1, seed)
    run(optimizer, param, first)
    zeros = (torch.zeros(n, dtype=torch.float64),) * sum(rules.RULES[optimizer.rule].states)
    states = tuple(values for values, *_ in decoded(optimizer, param)) if before else zeros
    group = optimizer.param_groups[0]
    betas = (*group["betas"], 0.0)[:3]
    settings = rules.Hyper(betas, group["eps"], group["weight_decay"], group.get("alpha", 0.0), 0, 0)
    c = rules.coefficients(optimizer.rule, before + 1, group["lr"], settings)
    _, moved, new = rules.moved(
        optimizer.rule, c, param.detach().double(), last.double(), states, optimizer.args.max_unorm, group["eps"]
    )

    run(optimizer, param, [last])

    off = (param.detach().double() - moved).abs() > CLOSE[dtype][1] + CLOSE[dtype][0] * moved.abs()
    assert off.float().mean() < (0.02 if name == "Lion" else 1e-9)
    for (_, codes, table, scale), state in zip(decoded(optimizer, param), new, strict=True):
        assert ((scale - _largest(state)).abs() <= 1e-5 * _largest(state) + 1e-12).all()
        scaled = torch.where(scale == 0, 0.0, state / scale)
        distance = (table - scaled[:, None]).abs()
        chosen = distance.gather(1, codes.long()[:, None])[:, 0]
        nudged = (table.min() < 0) & ((scaled < 0) != (table[distance.argmin(1)] < 0))  # to keep the state's sign
        assert (chosen - distance.min(1).values)[~nudged].le(1e-5).all()


def _largest(state):
    """The largest magnitude of each element's block of 256."""
    blocks = torch.nn.functional.pad(state.abs(), (0, -len(state) % 256)).view(-1, 256)
    return blocks.amax(1).repeat_interleave(256)[: len(state)]


def test_adam_and_adamw_agree_with_torch_adamw(build, randn):
    for name, decay in (("Adam", 0.1), ("AdamW", 0.01)):
        ours, theirs = randn(8, 8), randn(8, 8)
        optimizer = build(name, [ours], weight_decay=decay)
        reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=decay)

        for grad in gradients((8, 8), torch.float32, count=10):
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            optimizer.step()
            reference.step()

        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_skip_zeros_leaves_parameter_and_state_where_the_gradient_is_zero(randn):
    param = randn(4)
    args = type("Args", (), {"optim_bits": 32, "min_8bit_size": 4096, "max_unorm": 0.0, "skip_zeros": True})()
    optimizer = optim.AdamW([param], args=args)
    before = param.detach().clone()

    param.grad = torch.tensor([0.0, 1.0, 0.0, 1.0])
    optimizer.step()

    assert (param.detach() == before).tolist() == [True, False, True, False]
    assert (optimizer.state[param]["state1"] == 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", PLAIN)
def test_gradient_that_is_not_finite_stays_in_its_element(build, randn, step, name, bad, bits):
    param = randn(5000)
    optimizer = build(name, [param], optim_bits=bits)
    step(optimizer, [param])
    before = param.detach().clone()

    param.grad = torch.ones(5000)
    param.grad[1000] = bad
    optimizer.step()
    moved = (param.detach() != before).float().mean()
    step(optimizer, [param], seed=1)

    assert moved > 0.99
    finite = param.detach().isfinite()
    assert finite.sum() >= (5000 if bits == 8 else 4999)
    if bits == 8:
        assert optimizer.state[param]["absmax1"].isfinite().all()


def test_pytorch_lars_agrees_with_lars(build, randn):
    ours, theirs = randn(6, 6), randn(6, 6)
    optimizer = build("LARS", [ours], weight_decay=0.1)
    reference = PytorchLARS([theirs], lr=1e-2, momentum=0.9, weight_decay=0.1)

    for grad in gradients((6, 6), torch.float32, count=5):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_pytorch_lars_has_nesterov_momentum_and_dampening(randn):
    for arguments in ({"nesterov": True}, {"dampening": 0.5}):
        ours, theirs = randn(6, 6), randn(6, 6)
        optimizer = PytorchLARS([ours], lr=1e-2, momentum=0.9, max_unorm=0.0, **arguments)
        reference = torch.optim.SGD([theirs], lr=1e-2, momentum=0.9, **arguments)

        for grad in gradients((6, 6), torch.float32, count=4):
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            optimizer.step()
            reference.step()

        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
