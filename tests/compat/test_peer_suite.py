"""bitsandbytes' own tests on the drop-in, on the CPU, from a checkout that HALFBYTE_BNB_TESTS names.

All that they run by default must pass but for what peer_suite.toml lists, each with a reason; what is listed must fail.
They need the package lion-pytorch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

LISTED = Path(__file__).with_name("peer_suite.toml")
THEIRS = "not slow and not benchmark and not deprecated"  # their own choice, in their pyproject.toml


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each of their tests "passed", "failed" or "skipped"; a file that cannot be imported counts as one test."""
    checkout = os.environ.get("HALFBYTE_BNB_TESTS")
    if not checkout:
        pytest.skip("HALFBYTE_BNB_TESTS names no checkout of bitsandbytes")
    if importlib.util.find_spec("lion_pytorch") is None:
        pytest.fail("lion-pytorch is not installed")
    folder = tmp_path_factory.mktemp("peer_suite")
    (folder / "pytest.ini").write_text("[pytest]\n")  # instead of their options, which write into the checkout
    options = ["-c", folder / "pytest.ini", "--rootdir", checkout, "--junitxml", folder / "all.xml", "-m", THEIRS]
    dropped = ("HALFBYTE_", "BNB_", "PYTEST_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "halfbyte", "run", "-m", "pytest", Path(checkout) / "tests"),
            *("-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", *options),
        ],
        cwd=folder,
        env={**clean, **path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]
    found = read(folder / "all.xml")
    print(*(f"{count} {outcome}" for outcome, count in sorted(Counter(found.values()).items())), sep=", ")
    return found


def read(report: Path) -> dict[str, str]:
    """The outcomes in a JUnit report, by module.Class.test[parameters]."""
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        name = ".".join(one for one in (case.get("classname"), case.get("name")) if one)
        (outcome,) = {kinds[one.tag] for one in case if one.tag in kinds} or {"passed"}
        found[name] = outcome if found.get(name) != "failed" else "failed"
    return found


def listed() -> dict[str, str]:
    """pattern -> why it fails; in a pattern * stands for anything."""
    return tomllib.loads(LISTED.read_text())


def matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name, re.DOTALL) is not None


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_what_is_not_listed_passes(outcomes):
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]

    assert sum(outcome == "passed" for outcome in outcomes.values()) > 1000
    assert [name for name in failed if not any(matches(pattern, name) for pattern in listed())] == []


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_what_is_listed_fails(outcomes):
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]

    assert [pattern for pattern in listed() if not any(matches(pattern, name) for name in failed)] == []


def test_every_exception_has_a_sentence():
    assert listed()
    assert [reason for reason in listed().values() if not re.fullmatch(r"[A-Z].{20,}\.", reason)] == []


def test_report_is_read_by_full_name(tmp_path):
    (tmp_path / "all.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a.TestB" name="test_c[x-1]"/>'
        '<testcase classname="tests.test_a" name="test_d"><failure message="no"/></testcase>'
        '<testcase classname="tests.test_a" name="test_d"><error message="at teardown"/></testcase>'
        '<testcase classname="" name="tests.test_e"><error message="collection failure"/></testcase>'
        '<testcase classname="tests.test_a" name="test_f"><skipped/></testcase></testsuite></testsuites>'
    )

    assert read(tmp_path / "all.xml") == {
        "tests.test_a.TestB.test_c[x-1]": "passed",
        "tests.test_a.test_d": "failed",
        "tests.test_e": "failed",
        "tests.test_a.test_f": "skipped",
    }


def test_pattern_matches_the_whole_name():
    assert matches("tests.test_a.test_b[*-fp4]", "tests.test_a.test_b[64-fp4]")
    assert not matches("tests.test_a.test_b[*-fp4]", "tests.test_a.test_b[64-nf4]")
    assert not matches("tests.test_a.test_b", "tests.test_a.test_b[64-nf4]")
