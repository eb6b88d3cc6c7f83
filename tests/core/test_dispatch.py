"""Which kernel runs, who may say so, and what is said when none can."""

import asyncio
import threading
import warnings

import pytest
import torch

import halfbyte
from halfbyte import Decision, DeviceFacts, Kernel, probe
from halfbyte import functional as F
from halfbyte._runtime import dispatcher
from halfbyte.ops import fourbit

ops = torch.ops.halfbyte
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
T4 = DeviceFacts("cuda", 0, "nvidia", "sm_75", (7, 5), 32, 40, "T4")
H200 = DeviceFacts("cuda", 0, "nvidia", "sm_90", (9, 0), 32, 132, "H200")
MI300 = DeviceFacts("cuda", 0, "amd", "gfx942", None, 64, 304, "MI300X")


def facts(device=CPU, dtype=torch.float32, format="nf4", blocksize=64, nested=False):
    return fourbit.PackedFacts(device, dtype, format, blocksize, nested)


def explain(**kwargs):
    return halfbyte.explain("dequantize_4bit", facts(**kwargs))


def quantized(n=256):
    with halfbyte.use_backend("reference"):
        return F.quantize_4bit(torch.ones(n))


def runs(stub, n=256):
    """How often a stub is called by one dequantize_4bit."""
    packed, state = quantized(n)
    before = len(stub.calls)
    F.dequantize_4bit(packed, state)
    return len(stub.calls) - before


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(T4)`: the facts of cuda:0, without one."""

    def set(device):
        monkeypatch.setattr(probe, "confirmed", lambda asked: device if asked.type == "cuda" else probe.cpu())

    return set


# -- priority and limits -------------------------------------------------------------------------------------


def test_backend_with_the_highest_priority_runs(stub_backend):
    low, high = stub_backend("low", priority=101), stub_backend("high", priority=102)

    assert runs(high) == 1
    assert low.calls == []


def test_backends_of_one_priority_are_asked_by_name(stub_backend):
    stub_backend("zeta", priority=101)
    stub_backend("acme", priority=101)

    assert explain().backend == "acme"


def test_backend_whose_kernel_does_not_apply_is_passed_over(stub_backend):
    stub_backend("acme", limits={"blocksize": {64, 128}, "dtype": {torch.float16}})

    decision = explain(blocksize=32)

    assert decision.backend != "acme"
    assert decision.tried[0] == ("acme", ("blocksize=32 (takes 64, 128)", "dtype=float32 (takes float16)"))


def test_backend_without_a_kernel_for_the_op_is_passed_over(stub_backend):
    stub_backend("acme", ops=("matmul_int8",))

    assert explain().tried[0] == ("acme", ("has no kernel for dequantize_4bit",))


def test_backend_that_the_machine_cannot_run_is_passed_over(stub_backend):
    stub_backend("acme", why_not=("torch_acme is not installed",))

    assert explain().tried[0] == ("acme", ("torch_acme is not installed",))


def test_backend_that_the_device_cannot_run_is_passed_over(stub_backend):
    stub_backend("acme", why_not_device=lambda device: (f"needs arch a2, {device} is {device.type}",))

    assert explain().tried[0] == ("acme", ("needs arch a2, cpu is cpu",))


def test_backend_of_another_device_type_is_not_asked(stub_backend):
    stub_backend("acme", device_types=("xpu",))

    assert "acme" not in dict(explain().tried)


def raising(*args):
    raise OSError("libacme.so: no such file")


@pytest.mark.parametrize("where", ["why_not", "why_not_device"])
def test_backend_whose_answer_raises_is_passed_over(stub_backend, where):
    stub_backend("acme", **{where: raising})

    assert explain().tried[0] == ("acme", (f"its {where} raised OSError: libacme.so: no such file",))
    assert "acme" not in halfbyte.active().values()
    assert [b.name for b in halfbyte.backends()].count("acme") == 1


def test_backend_whose_kernels_cannot_be_loaded_is_passed_over(stub_backend):
    stub_backend("acme", kernels=raising)

    assert explain().tried[0] == ("acme", ("its kernels cannot be loaded: OSError: libacme.so: no such file",))
    packed, state = quantized()
    F.dequantize_4bit(packed, state)


def test_kernels_that_cannot_be_loaded_are_loaded_once_and_remembered(stub_backend, caplog):
    loads = []

    def kernels():
        loads.append(1)
        raise OSError("libacme.so: no such file")

    def reasons():
        return next(info.reasons for info in halfbyte.backends() if info.name == "acme")

    stub_backend("acme", kernels=kernels)

    assert (halfbyte.active()["cpu"], reasons(), loads) == ("acme", (), [])  # not known yet, and not found out here
    quantized()
    for _ in range(2):
        F.quantize_8bit(torch.ones(8))
        explain()
    assert halfbyte.active()["cpu"] != "acme"
    assert reasons() == ("its kernels cannot be loaded: OSError: libacme.so: no such file",)
    assert loads == [1]
    assert [one.message for one in caplog.records] == [f"backend acme is not used: {reasons()[0]}"]


@pytest.mark.parametrize("ask", [halfbyte.active, explain, lambda: F.quantize_8bit(torch.ones(8))])
def test_forced_backend_whose_kernels_cannot_be_loaded_is_unavailable(stub_backend, environment, ask):
    stub_backend("acme", kernels=raising)
    stub_backend("gpu", device_types=("cuda",), kernels=lambda: pytest.fail("there is no device for it"))
    environment({"HALFBYTE_BACKEND": "acme"})

    reason = r"\(acme: its kernels cannot be loaded: OSError: libacme.so: no such file\)$"
    with pytest.raises(halfbyte.BackendUnavailable, match=f"^.*HALFBYTE_BACKEND=acme .*{reason}"):
        ask()
    with pytest.raises(halfbyte.BackendUnavailable, match=f"^set_backend=acme cannot run on this machine {reason}"):
        halfbyte.set_backend("acme")
    with halfbyte.use_backend("acme,reference"):
        assert (halfbyte.active()["cpu"], explain().backend) == ("reference", "reference")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Kernel("no_such_op", print), "has a kernel for an unknown op 'no_such_op'"),
        (
            Kernel("matmul_int8", print, limits={"blocksize": {64}}),
            "limits matmul_int8 by blocksize; its facts are device",
        ),
    ],
)
def test_backend_with_a_kernel_that_fits_no_op_is_passed_over(stub_backend, kernel, reason):
    stub_backend("acme", kernels=[kernel])

    assert explain().tried[0] == ("acme", (f"its kernels cannot be loaded: ConfigError: backend acme {reason}",))


def test_rule_is_asked_after_the_limits(stub_backend):
    asked = []

    def rule(facts):
        asked.append(facts.blocksize)
        return ("only when it rains",)

    stub_backend("acme", ops=("dequantize_4bit",), limits={"blocksize": {64}}, rule=rule)

    assert explain(blocksize=64).tried[0][1] == ("only when it rains",)
    assert explain(blocksize=128).tried[0][1] == ("blocksize=128 (takes 64)",)
    assert asked == [64]


def test_rule_that_raises_counts_against_its_kernel(stub_backend):
    stub_backend("acme", rule=raising)

    assert explain().tried[0] == ("acme", ("its why_not raised OSError: libacme.so: no such file",))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"format": "nf4"}, r"limits\['format'\] of kernel 'x' must be a set of values; got 'nf4'"),
        ({"blocksize": 64}, r"limits\['blocksize'\] of kernel 'x' must be a set of values; got 64"),
        ({"blocksize": set()}, r"limits\['blocksize'\] of kernel 'x' must be a set of values; got set\(\)"),
    ],
)
def test_kernel_refuses_limits_that_are_not_sets(limits, message):
    with pytest.raises(TypeError, match=message):
        Kernel("x", print, limits=limits)


def test_kernel_refuses_a_function_that_is_none():
    with pytest.raises(TypeError, match="function of kernel 'x' must be callable; got 3"):
        Kernel("x", 3)


# -- variants ------------------------------------------------------------------------------------------------


def reference(*args):
    return fourbit.dequantize_4bit(*args)


def variant(name, priority=0, **limits):
    return Kernel("dequantize_4bit", reference, variant=name, priority=priority, limits=limits)


def test_variant_with_the_highest_priority_runs(stub_backend):
    stub_backend("acme", kernels=[variant("avx2", 1), variant("avx512", 2), variant("plain")])

    decision = explain()

    assert (decision.backend, decision.variant) == ("acme", "avx512")
    assert str(decision).startswith("acme (avx512) runs dequantize_4bit for:\n")


def test_next_variant_runs_where_the_best_does_not_apply(stub_backend):
    stub_backend("acme", kernels=[variant("avx512", 2, blocksize={64}), variant("avx2", 1)])

    assert explain(blocksize=64).variant == "avx512"
    assert explain(blocksize=32).variant == "avx2"


def test_variants_name_whose_reason_it_is(stub_backend):
    stub_backend(
        "acme", kernels=[variant("avx2", 1, blocksize={64}, nested={False}), variant("amx", 2, blocksize={64})]
    )

    assert explain(blocksize=32, nested=True).tried[0] == (
        "acme",
        ("blocksize=32 (takes 64)", "avx2: nested=True (takes False)"),
    )


# -- compute capability and arch -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cc", "device", "reasons"),
    [
        (((8, 0), None), H200, ()),
        (((9, 0), (9, 0)), H200, ()),
        (((8, 0), None), T4, ("needs sm_80 or newer, cuda:0 is sm_75",)),
        ((None, (8, 9)), H200, ("needs sm_89 or older, cuda:0 is sm_90",)),
        ((None, (8, 9)), T4, ()),
        (((8, 0), None), MI300, ("needs a device with a compute capability, cuda:0 has none",)),
        ((None, None), MI300, ()),
    ],
)
def test_kernel_compute_capability_limits(cc, device, reasons):
    assert Kernel("x", print, cc=cc).why_not(facts(CUDA), device) == reasons


@pytest.mark.parametrize(
    ("archs", "device", "reasons"),
    [
        ({"gfx942", "gfx90a"}, MI300, ()),
        ({"gfx90a", "gfx908"}, MI300, ("needs arch gfx908, gfx90a, cuda:0 is gfx942",)),
        ({"gfx90a"}, DeviceFacts("cuda", 0), ("needs arch gfx90a, cuda:0 is unknown",)),
    ],
)
def test_kernel_arch_limits(archs, device, reasons):
    assert Kernel("x", print, archs=frozenset(archs)).why_not(facts(CUDA), device) == reasons


def test_decision_prints_the_whole_trace(stub_backend, environment, gpu):
    gpu(T4)
    stub_backend("acme", device_types=("cuda",), limits={"blocksize": {64, 128, 256}})
    stub_backend(
        "other", device_types=("cuda",), rule=lambda facts: ("dtype=bfloat16 needs sm_80 or newer, cuda:0 is sm_75",)
    )
    environment({"HALFBYTE_BACKEND": "acme,other"})

    text = str(explain(device=CUDA, dtype=torch.bfloat16, blocksize=32))

    shown = [line for line in text.split("\n") if not line.endswith(": not in HALFBYTE_BACKEND=acme,other")]
    assert "  reference: not in HALFBYTE_BACKEND=acme,other" in text
    assert shown[:8] == [
        "no backend can run dequantize_4bit for:",
        "    device     cuda:0 (sm_75)",
        "    dtype      bfloat16",
        "    format     nf4",
        "    blocksize  32",
        "    nested     False",
        "  acme: blocksize=32 (takes 64, 128, 256)",
        "  other: dtype=bfloat16 needs sm_80 or newer, cuda:0 is sm_75",
    ]


def test_decision_of_a_running_op_says_who_chose(stub_backend):
    stub_backend("acme")

    with halfbyte.use_backend("acme"):
        forced = explain()

    assert str(explain()).split("\n")[0] == "acme runs dequantize_4bit for:"
    assert explain().chosen_by == "priority"
    assert forced.chosen_by == "use_backend=acme"
    assert ("reference", "not in use_backend=acme") in forced.excluded


# -- forced --------------------------------------------------------------------------------------------------


def test_forced_backend_that_cannot_run_names_its_reasons(stub_backend):
    stub_backend("acme", limits={"blocksize": {64, 128}, "format": {"nf4"}})
    packed, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(2)

    with halfbyte.use_backend("acme"), pytest.raises(halfbyte.NoKernel) as caught:
        ops.dequantize_4bit(packed, absmax, None, None, None, "fp4", 32, (64,), torch.float32)

    ((name, reasons),) = caught.value.tried
    assert name == "acme"
    assert reasons == ("blocksize=32 (takes 64, 128)", "format=fp4 (takes nf4)")
    assert isinstance(caught.value.decision, Decision)
    assert str(caught.value) == str(caught.value.decision)


def test_forced_list_allows_the_fallback_in_its_order(stub_backend):
    acme = stub_backend("acme", limits={"blocksize": {64}})
    other = stub_backend("other", priority=1)
    stub_backend("best", priority=500)

    with halfbyte.use_backend("acme,other"):
        assert runs(acme) == 1
        assert explain(blocksize=32).backend == "other"
    with halfbyte.use_backend(["other", "acme"]):
        assert runs(other) == 1


def test_forced_unknown_backend_names_those_known(stub_backend):
    with pytest.raises(halfbyte.ConfigError, match=r"^use_backend: there is no backend 'acme'; known are .*reference"):
        halfbyte.use_backend("acme").__enter__()
    with pytest.raises(halfbyte.ConfigError, match=r"^set_backend: there is no backend 'acme'"):
        halfbyte.set_backend("acme")
    assert dispatcher.process_chain is None


def test_forced_backend_that_the_machine_cannot_run_is_unavailable(stub_backend):
    stub_backend("acme", why_not=("no driver",))

    message = r"^use_backend=acme cannot run on this machine \(acme: no driver\)$"
    with pytest.raises(halfbyte.BackendUnavailable, match=message):
        halfbyte.use_backend("acme").__enter__()


def test_forced_list_needs_only_one_backend_that_the_machine_can_run(stub_backend):
    stub_backend("acme", why_not=("no driver",))

    with halfbyte.use_backend("acme,reference"):
        assert explain().backend == "reference"


def test_forced_chain_binds_only_device_types_it_claims(stub_backend):
    stub_backend("gpu", device_types=("cuda",), priority=300)
    cpu = stub_backend("acme")

    with halfbyte.use_backend("gpu"):
        decision = explain()
        assert runs(cpu) == 1

    assert (decision.backend, decision.chosen_by) == ("acme", "priority")
    assert not [name for name, reason in decision.excluded if "not in" in reason]


def test_forced_backend_of_another_device_in_a_binding_chain_says_so(stub_backend, gpu):
    gpu(H200)
    stub_backend("gpu", device_types=("cuda",), limits={"blocksize": {64}})
    stub_backend("acme", device_types=("cpu", "xpu"))

    with halfbyte.use_backend("gpu,acme"):
        decision = explain(device=CUDA, blocksize=32)

    assert decision.tried == (("gpu", ("blocksize=32 (takes 64)",)), ("acme", ("serves cpu, xpu, not cuda",)))


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("", "use_backend must be a backend's name or a comma-separated list of names; got ''"),
        ("a,,b", "use_backend must be a backend's name or a comma-separated list of names; got 'a,,b'"),
        ("Triton", "use_backend must be a backend's name or a comma-separated list of names; got 'Triton'"),
        ("auto,reference", "use_backend: auto stands alone; got 'auto,reference'"),
        (None, "use_backend must be a backend's name or a comma-separated list of names; got None"),
        (3, "use_backend must be a backend's name or a comma-separated list of names; got 3"),
        ((), r"use_backend must name at least one backend; got \(\)"),
    ],
)
def test_chain_that_is_no_list_of_names_is_refused(chain, message):
    with pytest.raises(halfbyte.ConfigError, match=f"^{message}$"), halfbyte.use_backend(chain):
        pass
    if chain is not None:  # undoes the choice
        with pytest.raises(halfbyte.ConfigError, match=f"^{message.replace('use_', 'set_')}$"):
            halfbyte.set_backend(chain)


@pytest.mark.parametrize("chain", ["reference", " reference ", "reference,reference", ["reference"], ("reference",)])
def test_chain_grammar_takes_a_name_a_list_and_a_sequence(chain):
    with halfbyte.use_backend(chain):
        assert explain().chosen_by == "use_backend=reference"


def test_auto_undoes_an_outer_choice(stub_backend):
    stub_backend("acme")

    with halfbyte.use_backend("reference"), halfbyte.use_backend("auto"):
        assert explain().backend == "acme"
    halfbyte.set_backend("reference")
    with halfbyte.use_backend("auto"):
        assert explain().backend == "acme"


# -- precedence ----------------------------------------------------------------------------------------------


def test_choice_precedence_from_first_to_last(stub_backend, environment):
    for name in ("p1", "p2", "p3", "p4"):
        stub_backend(name, priority=10)
    stub_backend("p5", priority=20, hooks={"halfbyte_rank": lambda op, facts, candidates: ["p5"]})
    stub_backend("p6", priority=900)
    variables = {"HALFBYTE_BACKEND_DEQUANTIZE_4BIT": "p3", "HALFBYTE_BACKEND": "p4"}

    environment(variables)
    halfbyte.set_backend("p2")
    with halfbyte.use_backend("p1"):
        assert explain().backend == "p1"
    assert (explain().backend, explain().chosen_by) == ("p2", "set_backend=p2")
    halfbyte.set_backend(None)
    assert (explain().backend, explain().chosen_by) == ("p3", "HALFBYTE_BACKEND_DEQUANTIZE_4BIT=p3")
    environment({"HALFBYTE_BACKEND": "p4"})
    assert (explain().backend, explain().chosen_by) == ("p4", "HALFBYTE_BACKEND=p4")
    environment({})
    assert (explain().backend, explain().chosen_by) == ("p5", "halfbyte_rank")
    dispatcher.plugins.remove("p5")
    assert (explain().backend, explain().chosen_by) == ("p6", "priority")


def test_calls_follow_the_same_precedence(stub_backend, environment):
    first, second, third = (stub_backend(name, priority=10) for name in ("p1", "p2", "p3"))
    environment({"HALFBYTE_BACKEND": "p3"})

    assert runs(third) == 1
    halfbyte.set_backend("p2")
    assert runs(second) == 1
    with halfbyte.use_backend("p1"):
        assert runs(first) == 1
    assert runs(second) == 1
    halfbyte.set_backend(None)
    assert runs(third) == 1
    assert (len(first.calls), len(second.calls), len(third.calls)) == (1, 2, 2)


def test_variable_of_another_op_does_not_matter(stub_backend, environment):
    stub_backend("acme")
    environment({"HALFBYTE_BACKEND_MATMUL_INT8": "reference"})

    assert explain().backend == "acme"
    assert halfbyte.explain("matmul_int8", torch.zeros(1, 1).char(), torch.zeros(1, 1).char()).backend == "reference"


# -- threads, tasks, autograd --------------------------------------------------------------------------------


def test_use_backend_holds_in_its_own_thread_only(stub_backend):
    stub_backend("acme")
    seen = []
    with halfbyte.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(explain().backend))
        thread.start()
        thread.join()
        assert explain().backend == "reference"

    assert seen == ["acme"]


def test_use_backend_holds_in_its_own_task_only(stub_backend):
    stub_backend("acme")

    async def choose(name):
        with halfbyte.use_backend(name):
            await asyncio.sleep(0)
            return explain().backend

    async def main():
        return await asyncio.gather(choose("acme"), choose("reference"), choose("acme"))

    assert asyncio.run(main()) == ["acme", "reference", "acme"]


def test_use_backend_ends_with_an_exception(stub_backend):
    stub_backend("acme")
    with pytest.raises(KeyError), halfbyte.use_backend("reference"):
        raise KeyError

    assert explain().backend == "acme"


@pytest.mark.parametrize("chain", ["acme", None])
def test_backward_in_another_thread_follows_the_forward(stub_backend, chain):
    acme = stub_backend("acme", priority=-1)
    packed, state = quantized(64 * 8)
    state.shape = torch.Size((8, 64))
    x = torch.ones(3, 64, requires_grad=True)
    with halfbyte.use_backend(chain or "auto"):
        y = F.linear_4bit(x, packed, state)

    thread = threading.Thread(target=lambda: y.sum().backward())
    with halfbyte.use_backend("reference" if chain else "acme"):  # of no concern to the other thread's backward
        thread.start()
        thread.join()

    assert acme.calls == (["linear_4bit", "linear_4bit_backward"] if chain else [])
    assert x.grad is not None


def test_backward_ignores_where_it_is_called_from(stub_backend):
    acme = stub_backend("acme", priority=-1)
    packed, state = quantized(64 * 8)
    state.shape = torch.Size((8, 64))
    x = torch.ones(3, 64, requires_grad=True)
    with halfbyte.use_backend("acme"):
        y = F.linear_4bit(x, packed, state)
    with halfbyte.use_backend("reference"):
        y.sum().backward()
        assert explain().backend == "reference"

    assert acme.calls == ["linear_4bit", "linear_4bit_backward"]


# -- plans ---------------------------------------------------------------------------------------------------


def test_plan_is_resolved_once(stub_backend):
    decisions, rules = [], []
    stub = stub_backend(
        "acme",
        ops=("dequantize_4bit",),
        rule=lambda facts: tuple(rules.append(facts) or ()),
        hooks={"halfbyte_resolved": lambda decision: decision.op == "dequantize_4bit" and decisions.append(decision)},
    )

    for _ in range(3):
        assert runs(stub, 256) == 1
    assert len(decisions) == len(rules) == 1
    assert (decisions[0].op, decisions[0].backend) == ("dequantize_4bit", "acme")
    assert runs(stub, 512) == 1  # another shape is the same situation
    assert len(decisions) == 1
    packed, state = quantized()
    F.dequantize_4bit(packed, state, dtype=torch.float16)
    assert len(decisions) == 2


def test_explain_leaves_no_plan(stub_backend):
    decisions = []
    stub_backend("acme", hooks={"halfbyte_resolved": lambda decision: decisions.append(decision)})

    explain()

    assert decisions == []


def test_plan_that_failed_is_tried_again(stub_backend):
    reasons = ["asleep"]
    stub = stub_backend("acme", rule=lambda facts: tuple(reasons))
    with halfbyte.use_backend("acme"):
        with pytest.raises(halfbyte.NoKernel):
            runs(stub)
        reasons.clear()
        assert runs(stub) == 1


# -- explain and active --------------------------------------------------------------------------------------


def refusing(calls, when=lambda *args: True):
    """A kernel for dequantize_4bit that can tell only when it is called that it cannot run."""

    def kernel(*args):
        calls.append(args[6])
        if when(*args):
            raise halfbyte.KernelUnusable("does not compile")
        return fourbit.dequantize_4bit(*args)

    return Kernel("dequantize_4bit", kernel)


def test_kernel_that_turns_out_unusable_is_called_once_and_the_next_one_runs(stub_backend, caplog):
    calls = []
    stub_backend("acme", kernels=[refusing(calls)])
    packed, state = quantized()

    with caplog.at_level("WARNING", "halfbyte.dispatch"):
        for _ in range(3):
            assert torch.equal(F.dequantize_4bit(packed, state), torch.ones(256))

    assert calls == [64]
    assert [record.message for record in caplog.records if "does not compile" in record.message] != []
    assert len(caplog.records) == 1
    assert dict(explain().tried)["acme"] == ("does not compile",)


def test_unusable_kernel_of_a_forced_backend_is_an_error_with_its_reason(stub_backend):
    calls = []
    stub_backend("acme", kernels=[refusing(calls)])
    packed, state = quantized()

    with halfbyte.use_backend("acme"):
        for _ in range(2):
            with pytest.raises(halfbyte.NoKernel) as caught:
                F.dequantize_4bit(packed, state)
            assert caught.value.tried == (("acme", ("does not compile",)),)

    assert len(calls) == 1


def test_kernel_unusable_in_one_situation_runs_in_the_others(stub_backend):
    calls = []
    stub_backend("acme", kernels=[refusing(calls, lambda *args: args[6] == 64)])
    packed, state = quantized()
    F.dequantize_4bit(packed, state)

    assert explain().backend != "acme"
    assert explain(blocksize=128).backend == "acme"


def test_explain_takes_the_arguments_of_the_op(stub_backend):
    stub_backend("acme")
    packed, state = quantized()

    decision = halfbyte.explain(
        "dequantize_4bit", packed, state.absmax, None, None, None, "nf4", 64, (256,), torch.float16
    )

    assert (decision.op, decision.backend, decision.variant) == ("dequantize_4bit", "acme", "")
    assert decision.facts == facts(dtype=torch.float16)
    assert decision.device == probe.cpu()
    assert decision.kernel.op == "dequantize_4bit"


def test_explain_of_a_failing_case_does_not_raise(stub_backend):
    stub_backend("acme", limits={"blocksize": {64}})

    with halfbyte.use_backend("acme"):
        decision = explain(blocksize=32)

    assert decision.backend is None
    assert decision.kernel is None


def test_explain_checks_the_arguments():
    with pytest.raises(halfbyte.InputError, match="blocksize must be one of"):
        halfbyte.explain("quantize_4bit", torch.zeros(8), "nf4", 100)


def test_explain_names_the_ops_it_knows():
    with pytest.raises(halfbyte.InputError, match=r"^op must be one of dequantize_4bit, .*; got 'linear'$"):
        halfbyte.explain("linear")


def test_active_names_the_backend_of_each_device(stub_backend, monkeypatch):
    monkeypatch.setattr(probe, "_accelerators", lambda: iter([T4, H200]))
    stub_backend("old", device_types=("cuda",), priority=90, why_not_device=lambda d: () if d.cc < (8, 0) else ("new",))
    stub_backend("new", device_types=("cuda",), priority=80)
    stub_backend("acme")

    found = halfbyte.active()

    assert found["cpu"] == "acme"
    assert found["cuda:0"] in ("old", "new")


def test_active_follows_a_forced_chain(stub_backend, monkeypatch):
    monkeypatch.setattr(probe, "_accelerators", lambda: iter([H200]))
    stub_backend("gpu", device_types=("cuda",))
    stub_backend("acme")

    with halfbyte.use_backend("reference"):
        assert halfbyte.active() == {"cuda:0": "reference", "cpu": "reference"}
    with halfbyte.use_backend("gpu"):
        assert halfbyte.active() == {"cuda:0": "gpu", "cpu": "acme"}


def test_active_raises_where_a_forced_backend_cannot_run(stub_backend, monkeypatch):
    monkeypatch.setattr(probe, "_accelerators", lambda: iter([T4]))
    stub_backend("gpu", device_types=("cuda",), why_not_device=lambda device: ("too old",))

    with (
        halfbyte.use_backend("gpu"),
        pytest.raises(halfbyte.BackendUnavailable, match="no backend of use_backend=gpu can run on cuda:0"),
    ):
        halfbyte.active()


def test_backends_lists_them_by_priority_with_reasons(stub_backend):
    stub_backend("acme", priority=200, why_not=("no driver",))
    stub_backend("other", priority=150, device_types=("xpu", "cpu"))

    first, second, *_ = halfbyte.backends()

    assert (first.name, first.priority, first.reasons, first.provider) == ("acme", 200, ("no driver",), "acme-dist 1.0")
    assert (second.name, second.device_types, second.reasons) == ("other", ("cpu", "xpu"), ())
    assert {info.name for info in halfbyte.backends()} >= {"reference", "cpu"}


@pytest.mark.parametrize("args", [(), (torch.zeros(2, 64),)])
def test_explain_with_a_wrong_number_of_arguments_names_them(args):
    message = (
        "linear_4bit takes x, packed, absmax, nested_absmax, nested_codebook, offset, bias, format, blocksize, "
        f"out_features, or its Facts; got {len(args)} arguments"
    )
    with pytest.raises(halfbyte.InputError, match=f"^{message}$"):
        halfbyte.explain("linear_4bit", *args)


# -- the reference on an accelerator -------------------------------------------------------------------------


def planned(device=CUDA, **kwargs):
    """What the first call of an op does, on facts of a device that this machine may lack."""
    op = dispatcher.plugins.ops["dequantize_4bit"]
    return dispatcher._planned(op, facts(device, **kwargs), None, {})


def test_fallback_on_an_accelerator_warns_once_per_op_and_device(gpu, stub_backend):
    gpu(T4)
    stub_backend("acme", device_types=("cuda",), limits={"blocksize": {64}})

    message = r"^dequantize_4bit on cuda:0 runs the slow reference \(acme: blocksize=32 \(takes 64\)(; .*)?\)$"
    with pytest.warns(halfbyte.HalfbytePerformanceWarning, match=message) as caught:
        planned(blocksize=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(blocksize=128)

    assert len(caught) == 1


def test_fallback_on_the_cpu_does_not_warn():
    planned(CPU)  # warnings are errors here


def test_fallback_that_was_asked_for_does_not_warn(gpu):
    gpu(T4)
    with halfbyte.use_backend("reference"):
        op = dispatcher.plugins.ops["dequantize_4bit"]
        dispatcher._planned(op, facts(CUDA), ("reference",), {})


@pytest.mark.parametrize("ranked", [["acme", "reference"], ["reference"]])
def test_fallback_under_a_rank_warns_unless_the_rank_says_reference_first(gpu, stub_backend, ranked):
    gpu(T4)
    stub_backend(
        "acme",
        device_types=("cuda",),
        limits={"blocksize": {64}},
        hooks={"halfbyte_rank": lambda op, facts, candidates: ranked},
    )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        planned(blocksize=32)

    assert len(caught) == (ranked[0] == "acme")


def test_probe_of_the_cpu_creates_no_device():
    assert probe.machine()[-1] == probe.cpu()
    assert probe.confirmed(CPU).type == "cpu"
    assert str(T4) == "cuda:0"
    assert str(probe.cpu()) == "cpu"
