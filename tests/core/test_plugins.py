"""Plugins: what is registered, what is quarantined, and that nothing else suffers.

The fake distributions are a package and a .dist-info folder each, put on the path of a fresh interpreter.
"""

import textwrap
from types import SimpleNamespace

import pytest
import torch

import halfbyte
from halfbyte import functional as F
from halfbyte import hookspecs
from halfbyte._runtime import dispatcher
from halfbyte.ops import fourbit

GOOD = """
import halfbyte
from halfbyte import Backend, Kernel

class {Class}(Backend):
    name = "{name}"
    device_types = frozenset({{"cpu"}})
    priority = 100
    def kernels(self):
        from halfbyte.ops.eightbit import dequantize_8bit
        yield Kernel("dequantize_8bit", dequantize_8bit)

@halfbyte.hookimpl
def halfbyte_backends():
    yield {Class}()
"""


def good(name="acme"):
    return GOOD.format(name=name, Class=name.title())


@pytest.fixture
def distribution(tmp_path):
    """`distribution("acme", source)`: install a plugin that is one module, as pip would."""

    def install(name, source, *, entry=None, version="1.0"):
        package = tmp_path / f"halfbyte_{name}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "plugin.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"halfbyte_{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: halfbyte-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[halfbyte.backends]\n{entry or name} = halfbyte_{name}.plugin\n")
        return tmp_path

    return install


REPORT = """
import halfbyte, torch
from halfbyte import functional as F
codes, state = F.quantize_8bit(torch.ones(8))
F.dequantize_8bit(codes, state)  # everything else goes on
for info in halfbyte.backends():
    if info.provider != "halfbyte":
        print(f"{info.name}|{info.provider}|{'; '.join(info.reasons)}")
"""


def report(python, path, **variables):
    """name -> (provider, reasons), as a fresh interpreter tells them."""
    done = python(REPORT, path=(path,), **variables)
    return {line.split("|")[0]: tuple(line.split("|")[1:]) for line in done.stdout.splitlines()}


def test_plugin_of_a_distribution_is_picked_like_a_builtin(python, distribution):
    path = distribution("acme", good())
    done = python(
        """
        import halfbyte, sys, torch
        from halfbyte import functional as F
        print(halfbyte.active()["cpu"])
        (info,) = [one for one in halfbyte.backends() if one.name == "acme"]
        print(info.provider, info.reasons)
        codes, state = F.quantize_8bit(torch.ones(8))
        print(halfbyte.explain("dequantize_8bit", codes, state.absmax, state.code, 256, torch.float32).backend)
        """,
        path=(path,),
    )

    assert done.stdout.splitlines() == ["acme", "halfbyte-acme 1.0 ()", "acme"]


BROKEN = {
    "import_error": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax_error": ("def f(:", "SyntaxError: "),
    "exits": ("raise SystemExit('no card')", "SystemExit: no card"),
    "asserts": ("assert False, 'first line\\nsecond line'", "AssertionError: first line"),
    "hook_raises": (
        "import halfbyte\n@halfbyte.hookimpl\ndef halfbyte_backends():\n    raise OSError('libacme.so is missing')",
        "OSError: libacme.so is missing",
    ),
    "hook_raises_late": (
        f"{good('late')}\n@halfbyte.hookimpl\ndef halfbyte_ops():\n    yield from ()\n    raise KeyError('k')",
        "KeyError: 'k'",
    ),
    "unknown_hook": (
        "import halfbyte\n@halfbyte.hookimpl\ndef halfbyte_backend():\n    return []",
        "PluginValidationError: ",
    ),
    "wrong_arguments": (
        "import halfbyte\n@halfbyte.hookimpl\ndef halfbyte_rank(op, facts, names):\n    return names",
        "PluginValidationError: ",
    ),
    "wrong_api": (
        good("wrong").replace("    priority", "    api = 2\n    priority"),
        "wrong was written for contract version 2; this halfbyte speaks 1",
    ),
    "taken_backend": (good("reference"), "the backend name 'reference' is taken by halfbyte"),
    "not_a_backend": (
        "import halfbyte\n@halfbyte.hookimpl\ndef halfbyte_backends():\n    yield 'acme'",
        "halfbyte_backends must yield Backend; got str",
    ),
    "not_iterable": (
        "import halfbyte\n@halfbyte.hookimpl\ndef halfbyte_backends():\n    return 3",
        "TypeError: 'int' object is not iterable",
    ),
    "bad_name": (
        good("bad").replace('name = "bad"', 'name = "Bad-Name"'),
        "a backend's name must match [a-z][a-z0-9_]*; got 'Bad-Name'",
    ),
    "named_auto": (good("auto"), "a backend's name must match [a-z][a-z0-9_]*; got 'auto'"),
    "no_priority": (
        good("nop").replace("    priority = 100\n", ""),
        "priority of nop must be an int; got None",
    ),
    "device_types": (
        good("dev").replace('frozenset({"cpu"})', '"cpu"'),
        "device_types of dev must be a frozenset of torch device types; got 'cpu'",
    ),
    "bad_env": (
        good("env").replace("    priority", "    env = ('HALFBYTE_ENV_X',)\n    priority"),
        "env of env must hold EnvVar records; got ('HALFBYTE_ENV_X',)",
    ),
    "abstract": (
        good("abstract").split("    def kernels")[0]
        + "\n@halfbyte.hookimpl\ndef halfbyte_backends():\n    yield Abstract()",
        "TypeError: Can't instantiate abstract class Abstract",
    ),
    "twice": (f"{good('twice')}    yield Twice()\n", "offers the backend 'twice' twice"),
    "not_an_op": (
        "import halfbyte\n@halfbyte.hookimpl\ndef halfbyte_ops():\n    yield 'rotate'",
        "halfbyte_ops must yield Op; got str",
    ),
}

OP = """
import halfbyte, torch
from typing import NamedTuple
from halfbyte import Kernel, Op

class Facts(NamedTuple):
    device: torch.device

def rotate(x):
    return x.roll(1)

OP = Op("rotate", "(Tensor x) -> Tensor", Facts, lambda x: Facts(x.device), rotate, torch.empty_like, lambda x: None,
        namespace="acme")

@halfbyte.hookimpl
def halfbyte_ops():
    yield OP
"""
BROKEN |= {
    "op_in_halfbyte": (
        OP.replace('namespace="acme"', 'namespace="halfbyte"'),
        "the op 'rotate' must live in a namespace of its own, not halfbyte",
    ),
    "op_taken": (OP.replace('"rotate"', '"linear_4bit"'), "the op 'linear_4bit' is already there"),
    "op_twice": (f"{OP}    yield OP\n", "the op 'rotate' is already there"),
    "op_of_torch": (OP.replace('"rotate"', '"add"').replace('"acme"', '"aten"'), "torch.ops.aten.add is already there"),
    "op_schema": (
        OP.replace("(Tensor x) -> Tensor", "(Tensor x -> Tensor"),
        "the schema of op 'rotate' is not one that torch can read: (Tensor x -> Tensor",
    ),
    "op_default": (
        OP.replace("(Tensor x) -> Tensor", "(Tensor x, int n=1) -> Tensor"),
        "ValueError: schema of op 'rotate' must have no defaults; got '(Tensor x, int n=1) -> Tensor'",
    ),
    "op_facts": (
        OP.replace("    device: torch.device", "    dtype: torch.dtype\n    device: torch.device"),
        "TypeError: Facts of op 'rotate' must be a NamedTuple whose first field is device; got ('dtype', 'device')",
    ),
    "op_mutable": (
        OP.replace("(Tensor x) -> Tensor", "(Tensor(a!) x) -> Tensor").replace(
            'namespace="acme"', 'namespace="acme", setup_context=print, backward=print'
        ),
        "the op 'rotate' writes to its arguments, so it can have no gradient",
    ),
}


def test_broken_plugins_are_quarantined_and_everything_else_goes_on(python, distribution):
    for name, (source, _) in BROKEN.items():
        path = distribution(name, source)
    distribution("acme", good())

    found = report(python, path)

    assert found.pop("acme") == ("halfbyte-acme 1.0", "")
    assert set(found) == set(BROKEN)
    for name, (_, reason) in BROKEN.items():
        provider, reasons = found[name]
        assert provider == f"halfbyte-{name} 1.0"
        assert reasons.startswith(f"quarantined: {reason}"), name


def test_naming_a_quarantined_plugin_raises_its_own_exception_as_the_cause(python, distribution):
    path = distribution("acme", "raise OSError('libacme.so is missing')")

    done = python(
        """
        import warnings
        warnings.simplefilter("ignore")
        import halfbyte
        for use in (halfbyte.active, lambda: halfbyte.use_backend("acme").__enter__()):
            try:
                use()
            except halfbyte.BackendUnavailable as error:
                print(error, "|", repr(error.__cause__))
        """,
        path=(path,),
        HALFBYTE_BACKEND="acme",
    )

    line = "backend acme is quarantined: OSError: libacme.so is missing | OSError('libacme.so is missing')"
    assert done.stdout.splitlines() == [line, line]


def test_two_distributions_of_one_plugin_name_are_told_apart(python, distribution):
    distribution("one", good("first"), entry="acme")
    path = distribution("two", good("second"), entry="acme")

    found = report(python, path)

    ((provider, reasons),) = [told for told in found.values() if "quarantined" in told[1]]
    assert {"first", "second"} & set(found)
    assert reasons.startswith("quarantined: the name 'acme' is taken by halfbyte-")
    assert provider in ("halfbyte-one 1.0", "halfbyte-two 1.0")
    assert provider.split()[0] not in reasons


def test_plugins_variable_limits_what_is_loaded(python, distribution):
    distribution("acme", good("acme"))
    path = distribution("other", good("other"))
    done = python(
        """
        import os
        import torch
        for value in (None, "all", "none", "other", "acme, other"):
            child = os.fork()  # each imports halfbyte anew
            if child == 0:
                if value is not None:
                    os.environ["HALFBYTE_PLUGINS"] = value
                import halfbyte
                names = sorted({info.name for info in halfbyte.backends()} & {"acme", "other"})
                print(value, names, flush=True)
                os._exit(0)
            os.waitpid(child, 0)
        """,
        path=(path,),
    )

    assert done.stdout.splitlines() == [
        "None ['acme', 'other']",
        "all ['acme', 'other']",
        "none []",
        "other ['other']",
        "acme, other ['acme', 'other']",
    ]


def test_unwanted_plugin_is_not_even_imported(python, distribution):
    path = distribution("acme", "raise SystemExit('imported')")

    assert report(python, path, HALFBYTE_PLUGINS="none") == {}


# -- each hook -----------------------------------------------------------------------------------------------


def test_every_hook_has_a_test():
    hooks = {name for name in vars(hookspecs) if name.startswith("halfbyte_")}
    named = {name.removeprefix("test_hook_") for name in globals() if name.startswith("test_hook_")}

    assert hooks == named


def test_every_hook_says_when_it_runs_and_shows_an_example():
    for name in vars(hookspecs):
        if name.startswith("halfbyte_"):
            text = getattr(hookspecs, name).__doc__
            assert "Called " in text
            assert f"def {name}(" in text.split("Example::")[1]


def test_hook_halfbyte_backends(stub_backend):
    stub_backend("acme", priority=123)

    assert halfbyte.backends()[0].name == "acme"
    assert halfbyte.active()["cpu"] == "acme"


def test_hook_halfbyte_ops(python, distribution):
    path = distribution(
        "acme",
        f"""
{OP}
class Acme(halfbyte.Backend):
    name = "acme"
    device_types = frozenset({{"cpu"}})
    priority = 100
    def kernels(self):
        yield Kernel("rotate", lambda x: x + 1)

@halfbyte.hookimpl
def halfbyte_backends():
    yield Acme()
""",
    )
    done = python(
        """
        import halfbyte, torch
        x = torch.arange(3)
        print(torch.ops.acme.rotate(x).tolist())
        with halfbyte.use_backend("reference"):
            print(torch.ops.acme.rotate(x).tolist())
        print(halfbyte.explain("rotate", x).backend, torch.ops.acme.rotate(x.to("meta")).shape)
        """,
        path=(path,),
        HALFBYTE_BACKEND_ROTATE="acme",
    )

    assert done.stdout.splitlines() == ["[1, 2, 3]", "[2, 0, 1]", "acme torch.Size([3])"]


def explain():
    facts = fourbit.PackedFacts(torch.device("cpu"), torch.float32, "nf4", 64, False)
    return halfbyte.explain("dequantize_4bit", facts)


def test_hook_halfbyte_rank(stub_backend):
    asked = []

    def rank(op, facts, candidates):
        asked.append((op.name, facts.blocksize, candidates[:2]))
        return ["unheard_of", "slow", "acme"]

    stub_backend("slow", priority=101, hooks={"halfbyte_rank": rank})
    stub_backend("acme", priority=102)

    decision = explain()

    assert (decision.backend, decision.chosen_by) == ("slow", "halfbyte_rank")
    assert asked == [("dequantize_4bit", 64, ("acme", "slow"))]
    with halfbyte.use_backend("acme"):
        assert explain().backend == "acme"
    assert len(asked) == 1  # a forced chain is the user's word


@pytest.mark.parametrize("arguments", [("op",), ("candidates", "facts"), ()])
def test_rank_may_take_fewer_arguments(stub_backend, arguments):
    scope = {}
    exec(f"def rank({', '.join(arguments)}): return ['slow']", scope)
    stub_backend("slow", priority=101, hooks={"halfbyte_rank": scope["rank"]})
    stub_backend("acme", priority=102)

    assert explain().backend == "slow"


def test_rank_that_answers_none_leaves_the_order_to_the_next(stub_backend):
    stub_backend("first", priority=101, hooks={"halfbyte_rank": lambda op: None})
    stub_backend("second", priority=102)

    assert (explain().backend, explain().chosen_by) == ("second", "priority")


def test_rank_that_raises_is_logged_and_ignored(stub_backend, caplog):
    def rank(op):
        raise ZeroDivisionError("1 / 0")

    stub_backend("acme", hooks={"halfbyte_rank": rank})

    assert explain().chosen_by == "priority"
    assert "halfbyte_rank of plugin acme raised" in caplog.text


def test_rank_that_leaves_all_out_leaves_nothing(stub_backend):
    stub_backend("acme", hooks={"halfbyte_rank": lambda op: []})

    decision = explain()

    assert decision.backend is None
    assert ("reference", "not in halfbyte_rank") in decision.excluded


def test_hook_halfbyte_resolved(stub_backend):
    told = []
    stub_backend("acme", hooks={"halfbyte_resolved": lambda decision: told.append(decision)})

    F.quantize_4bit(torch.ones(64))
    F.quantize_4bit(torch.ones(64))

    (decision,) = told
    assert (decision.op, decision.backend, decision.chosen_by) == ("quantize_4bit", "acme", "priority")


def test_resolved_that_raises_is_logged_and_ignored(stub_backend, caplog):
    def resolved():
        raise ZeroDivisionError("1 / 0")

    stub_backend("acme", hooks={"halfbyte_resolved": resolved})
    F.quantize_4bit(torch.ones(64))

    assert "halfbyte_resolved of plugin acme raised" in caplog.text


def test_hook_halfbyte_doctor_checks(stub_backend):
    def bad():
        raise OSError("no such device")

    stub_backend("acme", hooks={"halfbyte_doctor_checks": lambda: [halfbyte.Check("acme driver", True, "version 7")]})
    stub_backend("other", hooks={"halfbyte_doctor_checks": bad})

    checks = {check.name: check for check in dispatcher.plugins.doctor_checks()}

    assert checks["acme driver"] == halfbyte.Check("acme driver", True, "version 7")
    assert checks["other"] == halfbyte.Check("other", False, "its doctor check raised OSError: no such device")


# -- quarantine of a plugin in this process ------------------------------------------------------------------


def test_quarantined_plugin_leaves_no_hooks_behind(stub_backend):
    stub_backend("other")  # offers the backend "other"
    told = []
    broken = SimpleNamespace(
        halfbyte_resolved=halfbyte.hookimpl(lambda decision: told.append(decision)),
        halfbyte_backends=halfbyte.hookimpl(lambda: ["not a backend"]),
    )
    dispatcher.plugins.add("acme", "acme-dist 1.0", lambda: broken)
    try:
        F.quantize_4bit(torch.ones(64))
        assert "acme" in dispatcher.plugins.quarantined
        assert not dispatcher.plugins.manager.has_plugin("acme")
        assert told == []
    finally:
        dispatcher.plugins.remove("acme")


def test_keyboard_interrupt_is_not_swallowed():
    def load():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dispatcher.plugins.add("acme", "acme-dist 1.0", load)


def test_quarantine_shows_in_every_decision(stub_backend):
    dispatcher.plugins.add("acme", "acme-dist 1.0", lambda: __import__("no_such_module"))
    try:
        assert ("acme", "quarantined: ModuleNotFoundError: No module named 'no_such_module'") in explain().excluded
    finally:
        dispatcher.plugins.remove("acme")
