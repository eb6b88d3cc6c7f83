"""The environment variables: what they take, and what is said of a value that cannot be understood."""

import sys

import pytest
import torch

import halfbyte
import halfbyte_boot
from halfbyte import config
from halfbyte import functional as F

VARIABLES = {variable.name for variable in config.VARIABLES}


def test_every_variable_has_a_test():
    named = {name.removeprefix("test_env_") for name in globals() if name.startswith("test_env_")}

    assert {name.replace("_<OP>", "_OP") for name in VARIABLES} == named


def chosen(op="dequantize_4bit"):
    packed, state = torch.zeros(32, dtype=torch.uint8), torch.ones(1)
    if op == "dequantize_4bit":
        return halfbyte.explain(op, packed, state, None, None, None, "nf4", 64, (64,), torch.float32).backend
    return halfbyte.explain(op, torch.zeros(64), "nf4", 64).backend


def test_env_HALFBYTE_BACKEND(stub_backend, environment):
    stub_backend("acme")
    stub_backend("slow", priority=1)

    for value, backend in {"slow": "slow", "slow, acme": "slow", "auto": "acme", "": "acme"}.items():
        environment({"HALFBYTE_BACKEND": value})
        assert chosen() == backend


def test_env_HALFBYTE_BACKEND_OP(stub_backend, environment):
    stub_backend("acme")
    environment({"HALFBYTE_BACKEND_DEQUANTIZE_4BIT": "reference"})

    assert chosen("dequantize_4bit") == "reference"
    assert chosen("quantize_4bit") == "acme"


def test_env_HALFBYTE_FALLBACK(environment, monkeypatch):
    from halfbyte import probe
    from halfbyte._runtime import dispatcher
    from halfbyte.ops.int8 import MatmulFacts

    monkeypatch.setattr(probe, "confirmed", lambda device: halfbyte.DeviceFacts("cuda", 0, "nvidia", "sm_75", (7, 5)))
    facts = MatmulFacts(torch.device("cuda", 0))
    monkeypatch.setattr(dispatcher.plugins, "backends", {"reference": dispatcher.plugins.backends["reference"]})

    def first_call():
        return dispatcher._planned(dispatcher.plugins.ops["matmul_int8"], facts, None, {})

    environment({"HALFBYTE_FALLBACK": "error"})
    with pytest.raises(halfbyte.NoKernel, match=r"HALFBYTE_FALLBACK=error forbids the reference on an accelerator$"):
        first_call()
    environment({"HALFBYTE_FALLBACK": "silent"})
    first_call()
    environment({"HALFBYTE_FALLBACK": "warn"})
    with pytest.warns(halfbyte.HalfbytePerformanceWarning, match="no backend serves it"):
        first_call()
    first_call()  # said once


def test_env_HALFBYTE_PLUGINS():
    assert config.read({}).plugins is None
    assert config.read({"HALFBYTE_PLUGINS": "all"}).plugins is None
    assert config.read({"HALFBYTE_PLUGINS": "none"}).plugins == frozenset()
    assert config.read({"HALFBYTE_PLUGINS": "acme, other,"}).plugins == {"acme", "other"}


def test_plugin_that_is_not_installed_is_a_warning_at_import_and_an_error_at_the_first_use(python):
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import halfbyte
        print(*(one.message for one in caught))
        try:
            halfbyte.active()
        except halfbyte.ConfigError as error:
            print(error)
    """
    warned, raised = python(code, HALFBYTE_PLUGINS="cpu,missing").stdout.splitlines()

    assert raised.startswith("HALFBYTE_PLUGINS: there is no plugin 'missing'; installed are ")
    assert "cpu" in raised.partition("installed are ")[2]
    assert warned == f"{raised} (`halfbyte doctor` explains)"


@pytest.mark.parametrize(("value", "finders"), [("1", 1), ("0", 0), ("", 0)])
def test_env_HALFBYTE_BITSANDBYTES(environment, monkeypatch, value, finders):
    """Read when an interpreter starts, through halfbyte.pth: tests/compat/test_wheel.py."""
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if type(one).__name__ != "Finder"])
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setenv("HALFBYTE_BITSANDBYTES", value)

    halfbyte_boot.start()

    assert [type(one).__name__ for one in sys.meta_path].count("Finder") == finders
    environment({"HALFBYTE_BITSANDBYTES": value})
    assert chosen()


def test_wrong_word_for_the_drop_in_is_said():
    assert config.read({"HALFBYTE_BITSANDBYTES": "yes"}).errors == ("HALFBYTE_BITSANDBYTES must be 1 or 0; got 'yes'",)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"HALFBYTE_BACKEND": "Triton!"},
            "HALFBYTE_BACKEND must be a backend's name or a comma-separated list of names; got 'Triton!'",
        ),
        ({"HALFBYTE_BACKEND": "auto,triton"}, "HALFBYTE_BACKEND: auto stands alone; got 'auto,triton'"),
        (
            {"HALFBYTE_BACKEND_MATMUL_INT8": "a b"},
            "HALFBYTE_BACKEND_MATMUL_INT8 must be a backend's name or a comma-separated list of names; got 'a b'",
        ),
        ({"HALFBYTE_FALLBACK": "quiet"}, "HALFBYTE_FALLBACK must be one of warn, error, silent; got 'quiet'"),
        ({"HALFBYTE_BACKEND_LINEAR": "reference"}, "HALFBYTE_BACKEND_LINEAR: there is no op 'linear'; ops are "),
    ],
)
def test_variable_that_cannot_be_understood_is_an_error_at_the_first_use(environment, variables, message):
    environment(variables)

    for use in (halfbyte.active, chosen, lambda: F.quantize_4bit(torch.zeros(64))):
        with pytest.raises(halfbyte.ConfigError) as caught:
            use()
        assert str(caught.value).startswith(message)


def test_variables_are_all_complained_about_together(environment):
    environment({"HALFBYTE_BACKEND": "?", "HALFBYTE_FALLBACK": "?"})

    with pytest.raises(halfbyte.ConfigError, match=r"HALFBYTE_BACKEND must be .*; HALFBYTE_FALLBACK must be "):
        halfbyte.active()


def test_unknown_backend_in_the_environment_names_those_known(environment):
    environment({"HALFBYTE_BACKEND": "tritron"})

    message = r"^HALFBYTE_BACKEND: there is no backend 'tritron'; known are .*reference"
    for use in (halfbyte.active, chosen, lambda: F.quantize_4bit(torch.zeros(64))):
        with pytest.raises(halfbyte.ConfigError, match=message):
            use()


def test_backend_in_the_environment_that_cannot_run_says_why(stub_backend, environment):
    stub_backend("acme", why_not=("no driver", "no card"))
    environment({"HALFBYTE_BACKEND": "acme"})

    message = r"^HALFBYTE_BACKEND=acme cannot run on this machine \(acme: no driver, no card\)$"
    for use in (halfbyte.active, chosen, lambda: F.quantize_4bit(torch.zeros(64))):
        with pytest.raises(halfbyte.BackendUnavailable, match=message):
            use()


def test_use_backend_works_while_the_environment_names_a_backend_that_cannot_run(stub_backend, environment):
    stub_backend("acme", why_not=("no driver",))
    environment({"HALFBYTE_BACKEND": "acme"})

    with halfbyte.use_backend("reference"):
        assert chosen() == "reference"


def test_import_only_warns_of_a_bad_variable(python):
    done = python(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import halfbyte
        (warning,) = [w for w in caught if issubclass(w.category, halfbyte.HalfbyteWarning)]
        print(warning.message)
        try:
            halfbyte.active()
        except halfbyte.ConfigError as error:
            print(error)
        """,
        HALFBYTE_BACKEND="tritron",
    )

    first, second = done.stdout.splitlines()
    assert first == f"{second} (`halfbyte doctor` explains)"
    assert second.startswith("HALFBYTE_BACKEND: there is no backend 'tritron'; known are ")


def test_public_errors_keep_the_base_classes_of_bitsandbytes():
    for kind in (halfbyte.InputError, halfbyte.FormatError, halfbyte.ConfigError):
        assert issubclass(kind, ValueError)
        assert issubclass(kind, halfbyte.HalfbyteError)
    for kind in (halfbyte.NoKernel, halfbyte.BackendUnavailable, halfbyte.PluginError):
        assert issubclass(kind, RuntimeError)
        assert issubclass(kind, halfbyte.HalfbyteError)
