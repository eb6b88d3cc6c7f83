"""The conformance kit: right backends pass, wrong ones fail, missing hardware is a skip with its reason."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import halfbyte
from halfbyte import ops
from halfbyte._runtime import dispatcher
from halfbyte.testing import golden, mutants, plugin, samples
from halfbyte.testing.golden import __main__ as generator

KIT = ("--pyargs", "halfbyte.testing.checks")


@dataclass(eq=False)  # pytest hashes its plugins
class Outcome:
    """What a run of the kit inside this process gave."""

    code: int = 0
    output: str = ""
    collected: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # (node id, text)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected = len(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append((report.nodeid, report.longreprtext))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors only: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kit(tmp_path, capsys, one_thread) -> Callable[..., Outcome]:
    """`kit("--backend", "acme")`: run the kit in this process, which knows the test's backends."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*options: str) -> Outcome:
        outcome = Outcome()
        capsys.readouterr()
        isolated = ("-c", str(tmp_path / "pytest.ini"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider")
        outcome.code = int(
            pytest.main(
                [*isolated, "-p", "no:logging", "-q", "-rs", *options, *KIT], plugins=[mutants, plugin, outcome]
            )
        )
        captured = capsys.readouterr()
        outcome.output = captured.out + captured.err
        return outcome

    return run


@contextlib.contextmanager
def offered(name: str, kernels: list[halfbyte.Kernel], reasons: tuple[str, ...] = ()) -> Iterator[None]:
    members = {
        "name": name,
        "device_types": frozenset({"cpu"}),
        "priority": -1,
        "why_not": lambda self: reasons,
        "kernels": lambda self: kernels,
    }
    backend = type("Offered", (halfbyte.Backend,), members)()
    dispatcher.plugins.add(name, name, lambda: SimpleNamespace(halfbyte_backends=halfbyte.hookimpl(lambda: [backend])))
    dispatcher.forget()
    yield
    dispatcher.plugins.remove(name)
    dispatcher.forget()


def matmul(**declared) -> halfbyte.Kernel:
    return halfbyte.Kernel("matmul_int8", dispatcher.plugins.ops["matmul_int8"].reference, **declared)


# -- right ones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_built_in_backend_passes(name, tmp_path):
    """In a process of its own, as a user runs it; every variant of every kernel."""
    reasons = {info.name: info.reasons for info in halfbyte.backends()}.get(name, ())
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HALFBYTE_", "PYTEST_"))}
    # Thousands of small tests: pytest's log capture would be a third of the time.
    lean = ("-q", "-rs", "-W", "error", "-p", "no:cacheprovider", "-p", "no:logging")
    options = (*lean, "--backend", name, "--require", name)
    # torch's own kernels need no threads for tensors this small; the CPU backend's are tested with them.
    threads = {"OMP_NUM_THREADS": "1"} if name == "reference" else {}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "halfbyte.testing.plugin", *options, *KIT],
        cwd=tmp_path,
        env={**clean, **threads, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)},
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert f"backend {name} on cpu: checks passed, by block size" in done.stdout
    for op in dispatcher.plugins.ops:
        assert re.search(rf"^{op} +(float32|-) +[\d-]", done.stdout, re.MULTILINE), done.stdout[-4000:]
    assert "FAILED" not in done.stdout


def test_more_declared_support_means_more_checks(kit):
    def count(limits):
        op = dispatcher.plugins.ops["quantize_4bit"]
        with offered("declaring", [halfbyte.Kernel(op.name, op.reference, limits=limits)]):
            return kit("--backend", "declaring", "--collect-only").collected

    assert count({"blocksize": {64}, "dtype": {torch.float32}}) < count({"blocksize": {64}}) < count({})


def test_every_op_has_samples():
    assert [op.name for op in dispatcher.plugins.ops.values() if samples.of(op) is None] == []


def test_golden_file_is_what_the_oracle_makes():
    tensors, checksums = generator.make()
    stored, kept = golden.stored()

    assert checksums == kept
    assert tensors.keys() == stored.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, stored[name])] == []
    assert golden.FILE.stat().st_size < 300_000


# -- wrong ones ----------------------------------------------------------------------------------------------


def test_every_op_with_samples_has_a_mutant():
    mutated = {record.op for record in mutants.MUTANTS.values()}

    assert [op.name for op in ops.ALL if samples.of(op) is not None and op.name not in mutated] == []


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_mutant_is_caught(name, kit):
    op = mutants.MUTANTS[name].op

    outcome = kit("--backend", name, "-x")

    assert outcome.code == pytest.ExitCode.TESTS_FAILED, f"{name} was not caught\n{outcome.output[-2000:]}"
    ((test, text),) = outcome.failed
    assert op in test
    assert op in text


def test_failure_shows_in_the_table(kit):
    outcome = kit("--backend", "mutant_product_wraps_at_16_bits", "-k", "golden")

    assert re.search(r"^matmul_int8 +- +3 of 3 FAILED$", outcome.output, re.MULTILINE), outcome.output


# -- what cannot run -----------------------------------------------------------------------------------------


def test_missing_hardware_is_a_skip_with_its_reason(kit):
    with offered("absent", [matmul()], ("acme_driver is not installed",)):
        outcome = kit("--backend", "absent")

    assert outcome.code == 0
    assert "acme_driver is not installed" in outcome.output


def test_missing_hardware_that_is_required_fails(kit):
    with offered("absent", [matmul()], ("acme_driver is not installed",)):
        outcome = kit("--backend", "absent", "--require", "absent")

    assert outcome.code == pytest.ExitCode.TESTS_FAILED
    ((test, text),) = outcome.failed
    assert "test_required_backend_can_run" in test
    assert "absent cannot run here: acme_driver is not installed" in text


def test_variant_that_cannot_run_is_a_skip_with_its_reason(kit):
    kernels = [matmul(variant="plain"), matmul(variant="wide", rule=lambda facts: ("needs lanes of 512 bits",))]
    with offered("varied", kernels):
        both = kit("--backend", "varied")
        required = kit("--backend", "varied", "--variant", "wide", "--require", "varied")

    assert both.code == 0
    assert "wide: needs lanes of 512 bits" in both.output
    assert re.search(r"^variant plain: \d+ passed, 0 failed$", both.output, re.MULTILINE)
    assert [test.rpartition("::")[2] for test, _ in required.failed] == ["test_required_backend_can_run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the conformance kit needs --backend NAME"),
        (("--backend", "nobody"), "there is no backend 'nobody'; known are"),
        (("--backend", "reference", "--variant", "avx9"), "--variant avx9: reference has no named variant"),
    ],
)
def test_wrong_option_is_explained(kit, options, message):
    outcome = kit(*options)

    assert outcome.code == pytest.ExitCode.USAGE_ERROR or outcome.code == pytest.ExitCode.INTERRUPTED
    assert message in outcome.output
