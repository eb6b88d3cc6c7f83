"""Which backends the tests of this folder run on."""

import pytest

import halfbyte


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backend_is_among_those_tested(name):
    reasons = {info.name: info.reasons for info in halfbyte.backends()}[name]
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")

    assert halfbyte.active()["cpu"] in ("cpu", "reference")


def test_cpu_kernel_runs_what_it_has(backend):
    """The `backend` fixture must not let everything fall through to the reference."""
    if backend == "reference":
        pytest.skip("about the other backends")
    from halfbyte._runtime import dispatcher

    assert dispatcher.kernels(dispatcher.plugins.backends[backend])
