"""torch.compile(..., fullgraph=True) of a step: one op in the graph, and the same bits as outside."""

import copy
import gc
import weakref

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

NAMES = ["AdamW8bit", "AdamW", "AdEMAMix8bit", "Lion8bit", "SGD", "RMSprop8bit", "Adagrad", "LAMB8bit", "LARS"]
BACKENDS = ["eager", "aot_eager"]  # the parameters themselves, and copies of them, as inductor's graphs may have

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture
def model(randn):
    return lambda dtype=torch.float32: [randn(70, 60, dtype=dtype), randn(5, dtype=dtype)]


def give(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def same(ours, theirs):
    """Whether two optimizers have the same parameters and states."""
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for one, other in pairs:
        a, b = ours.state[one], theirs.state[other]
        if not torch.equal(one, other) or a.keys() != b.keys():
            return False
        if not all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a):
            return False
    return True


@pytest.mark.parametrize("graphs", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_step_is_one_graph_that_a_schedule_does_not_recompile(build, model, name, graphs):
    ours, theirs = model(), model()
    compiled, eager = build(name, ours), build(name, theirs)
    run = torch.compile(compiled.step, fullgraph=True, backend=graphs)  # before a schedule wraps it, untraceably
    schedules = [CosineAnnealingLR(one, 10) for one in (compiled, eager)]

    for seed in range(4):
        give(ours, seed)
        give(theirs, seed)
        with torch.compiler.set_stance("fail_on_recompile" if seed > 1 else "default"):
            run()
        eager.step()
        for schedule in schedules:
            schedule.step()

    assert same(compiled, eager)
    assert compiled.param_groups[0]["lr"] < 1e-2
    assert compiled.state[ours[0]]["step"] == 4


@pytest.mark.parametrize("graphs", BACKENDS)
@pytest.mark.parametrize(
    "own",
    [{"capturable": True}, {"fused_clip": 0.5}, {"lr": torch.tensor(0.01)}, {"stochastic_rounding": True}],
    ids=str,
)
def test_options_hold_in_a_compiled_step(build, model, graphs, own):
    ours, theirs = model(torch.bfloat16), model(torch.bfloat16)
    compiled, eager = build("AdamW8bit", ours, **own), build("AdamW8bit", theirs, **copy.deepcopy(own))
    run = torch.compile(compiled.step, fullgraph=True, backend=graphs)

    for seed in range(3):
        give(ours, seed)
        give(theirs, seed)
        run()
        eager.step()

    assert same(compiled, eager)


@pytest.mark.parametrize("graphs", BACKENDS)
def test_function_that_clips_and_steps_is_one_graph(build, model, graphs):
    ours, theirs = model(), model()
    compiled, eager = build("AdamW8bit", ours), build("AdamW8bit", theirs)

    def work(optimizer, params):
        for param in params:
            param.grad.mul_(0.5)
        optimizer.step()
        return sum(param.square().sum() for param in params)

    run = torch.compile(work, fullgraph=True, backend=graphs)
    for seed in range(3):
        give(ours, seed)
        give(theirs, seed)
        torch.testing.assert_close(run(compiled, ours), work(eager, theirs))

    assert same(compiled, eager)


def test_parameter_without_a_gradient_is_left_out_and_comes_back(build, model):
    ours, theirs = model(), model()
    compiled, eager = build("AdamW8bit", ours), build("AdamW8bit", theirs)
    run = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")

    for seed, idle in enumerate([False, True, True, False]):
        give(ours, seed)
        give(theirs, seed)
        if idle:
            ours[1].grad = theirs[1].grad = None
        run()
        eager.step()

    assert same(compiled, eager)
    assert [compiled.state[param]["step"] for param in ours] == [4, 2]


def test_compiled_step_without_any_gradient_does_nothing(build, model):
    params = model()
    optimizer = build("AdamW8bit", params)

    torch.compile(optimizer.step, fullgraph=True, backend="eager")()

    assert not optimizer.state


def test_copies_of_an_optimizer_are_stepped_apart(build, model):
    params = model()
    optimizer = build("AdamW8bit", params)
    other = copy.deepcopy(optimizer)
    copies = other.param_groups[0]["params"]
    before = [param.detach().clone() for param in params]
    give(copies, 0)

    torch.compile(other.step, fullgraph=True, backend="eager")()

    assert all(map(torch.equal, params, before))
    assert other.state[copies[0]]["step"] == 1


def test_optimizer_is_not_kept_by_its_number(build, model):
    optimizer = build("AdamW8bit", model())
    number, gone = optimizer._number, weakref.ref(optimizer)

    del optimizer
    gc.collect()

    assert gone() is None
    with pytest.raises(RuntimeError, match="does not exist any more"):
        torch.ops.halfbyte.step_optimizer(number, [], [])


@pytest.mark.parametrize("graphs", BACKENDS)
def test_setting_that_went_wrong_is_refused_in_a_compiled_step_too(build, model, graphs):
    params = model()
    optimizer = build("AdamW8bit", params)
    run = torch.compile(optimizer.step, fullgraph=True, backend=graphs)
    give(params, 0)
    optimizer.param_groups[0]["lr"] = -1.0
    before = params[0].detach().clone()

    with pytest.raises(ValueError, match="lr must be finite and at least 0"):
        run()

    assert torch.equal(params[0], before)
    assert torch.is_grad_enabled()
