"""Third-party backends, really installed: halfbyte's wheel and two example packages in a scratch environment.

The environment sees this one's packages (torch, pytest, ...) through a .pth file, and no checkout.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import venv
from collections.abc import Callable
from pathlib import Path

import pytest


def version(distribution: str) -> tuple[int, ...]:
    """Of an installed distribution, read from its metadata; () where it is not installed.

    Nothing is imported: even importlib.util.find_spec("pip") makes setuptools' _distutils_hack leave this process with
    the standard library's distutils, which warns.
    """
    for found in importlib.metadata.distributions(name=distribution):
        return tuple(int(part) for part in found.version.split(".")[:2] if part.isdecimal())
    return ()


for needed, least, why in (
    ("scikit-build-core", (0,), "builds halfbyte's wheel with scikit-build-core"),
    ("setuptools", (70, 1), "builds the example packages with setuptools 70.1"),
    ("pip", (0,), "installs them with pip"),
):
    if version(needed) < least:
        pytest.skip(why, allow_module_level=True)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUTER = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

Run = Callable[..., subprocess.CompletedProcess[str]]


def clean() -> dict[str, str]:
    """The environment without what could lead to a checkout or change a choice."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HALFBYTE_", "PYTEST_", "PYTHON", "COV_"))
    }


def call(*command: object, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean(), "OMP_NUM_THREADS": "1", **variables},  # small tensors only
        capture_output=True,
        text=True,
        timeout=280,
    )
    if check:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="session")
def scratch(tmp_path_factory) -> Path:
    """The Python of an environment with halfbyte's wheel, halfbyte-acme and halfbyte-broken."""
    folder = tmp_path_factory.mktemp("third-parties")
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    purelib = call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).stdout.strip()
    Path(purelib, "outer.pth").write_text("\n".join(OUTER) + "\n")

    pip = (sys.executable, "-m", "pip")
    offline = ("--quiet", "--no-build-isolation", "--no-deps", "--disable-pip-version-check")
    pure = ("--config-settings=wheel.cmake=false", f"--config-settings=build-dir={folder / 'build'}")
    call(*pip, "wheel", *offline, *pure, "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("halfbyte-*.whl")
    for name in ("halfbyte-acme", "halfbyte-broken"):
        # From a copy: setuptools builds inside the source folder.
        call(sys.executable, "-c", _COPY, HERE / name, folder / name, cwd=folder)
    into = ("--target", purelib, "--no-index", "--no-warn-script-location")
    call(*pip, "install", *offline, *into, wheel, folder / "halfbyte-acme", folder / "halfbyte-broken", cwd=folder)
    return python


_COPY = "import shutil, sys; shutil.copytree(*sys.argv[1:])"


@pytest.fixture
def run(scratch, tmp_path) -> Run:
    """`run(code, HALFBYTE_BACKEND="acme")`: code in the scratch environment."""

    def run(code: str, *, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        return call(scratch, "-W", "error", "-c", textwrap.dedent(code), cwd=tmp_path, check=check, **variables)

    return run


def printed(done: subprocess.CompletedProcess[str]) -> object:
    return json.loads(done.stdout.splitlines()[-1])


def test_page_shows_the_package_that_is_tested():
    page = (ROOT / "docs/pages/write-a-backend.md").read_text()
    for language, name in (("toml", "pyproject.toml"), ("python", "halfbyte_acme/plugin.py")):
        block = page.partition(f"```{language}\n# {name}\n")[2].partition("```")[0]
        real = (HERE / "halfbyte-acme" / name).read_text()
        shown = [line.partition("  #")[0].replace("(self):", "(self) ->").strip() for line in block.splitlines()]
        assert block
        assert [line for line in shown if line not in real and not line.startswith(("def halfbyte", "from . "))] == []


def test_wheel_is_used_and_no_checkout(run):
    done = run("import halfbyte, json, sys; print(json.dumps([halfbyte.__file__, *sys.path]))")

    assert [path for path in printed(done) if Path(path).is_relative_to(ROOT / "core")] == []
    assert "third-parties" in printed(done)[0]


def test_wheel_says_that_it_is_typed(run):
    done = run("import halfbyte, json; print(json.dumps(halfbyte.__path__))")

    assert [path for path in printed(done) if not (Path(path) / "py.typed").is_file()] == []


def test_plugin_is_picked(run):
    code = """
        import halfbyte, json, torch
        from halfbyte import functional as F
        x = torch.randn(4, 64)
        packed, state = F.quantize_4bit(x)
        decision = halfbyte.explain("quantize_4bit", x, "nf4", 64)
        print(json.dumps([halfbyte.active(), decision.backend, decision.chosen_by]))
    """
    assert printed(run(code)) == [{"cpu": "acme"}, "acme", "priority"]


def test_plugin_is_listed_with_its_distribution(run):
    code = """
        import halfbyte, json
        print(json.dumps({i.name: [i.priority, i.device_types, i.reasons, i.provider] for i in halfbyte.backends()}))
    """
    assert printed(run(code))["acme"] == [50, ["cpu"], [], "halfbyte-acme 1.0"]


def test_fallback_when_the_plugin_lacks_a_kernel(run):
    code = """
        import halfbyte, json, torch
        decision = halfbyte.explain("quantize_4bit", torch.randn(64), "fp4", 32)
        print(json.dumps([decision.backend, decision.tried]))
    """
    backend, tried = printed(run(code))

    assert backend in ("cpu", "reference")
    assert tried[0] == ["acme", ["format=fp4 (takes nf4)", "blocksize=32 (takes 64, 128)"]]


def test_forced_plugin_refuses_with_its_reasons(run):
    code = """
        import halfbyte, torch
        torch.ops.halfbyte.quantize_4bit(torch.randn(64, dtype=torch.float16), "fp4", 32)
    """
    done = run(code, check=False, HALFBYTE_BACKEND="acme")

    assert done.returncode == 1
    said = done.stderr.partition("NoKernel: ")[2]
    assert said.startswith("no backend can run quantize_4bit for:\n    device     cpu"), done.stderr
    assert "\n    dtype      float16\n    format     fp4\n    blocksize  32\n" in said
    assert (
        "\n  acme: format=fp4 (takes nf4); blocksize=32 (takes 64, 128); dtype=float16 (takes bfloat16, float32)\n"
        "  reference: not in HALFBYTE_BACKEND=acme\n"
    ) in said.replace("\n  cpu: not in HALFBYTE_BACKEND=acme", "")


def test_rule_refuses_in_a_sentence(run):
    code = """
        import halfbyte, json, torch
        from halfbyte.ops.fourbit import PackedFacts
        facts = PackedFacts(torch.device("cpu"), torch.float32, "nf4", 128, True)
        with halfbyte.use_backend("acme"):
            print(json.dumps(halfbyte.explain("dequantize_4bit", facts).tried))
    """
    assert printed(run(code)) == [["acme", ["nested absmax needs blocksize=64, got 128"]]]


def test_forced_plugin_with_a_wrong_variable_says_so(run):
    done = run("import halfbyte; halfbyte.active()", check=False, HALFBYTE_BACKEND="acme", HALFBYTE_ACME_TABLE="golden")

    sentence = "HALFBYTE_ACME_TABLE must be one of byte, nibble; got 'golden'"
    assert f"HALFBYTE_BACKEND=acme cannot run on this machine (acme: {sentence})" in done.stderr


def test_own_variable_chooses_the_variant(run):
    code = """
        import halfbyte, json, torch
        from halfbyte.ops.fourbit import PackedFacts
        facts = PackedFacts(torch.device("cpu"), torch.float32, "nf4", 64, False)
        print(json.dumps(halfbyte.explain("dequantize_4bit", facts).variant))
    """
    assert printed(run(code)) == "byte"
    assert printed(run(code, HALFBYTE_ACME_TABLE="nibble")) == "nibble"


def test_doctor_check_is_asked(run):
    code = """
        import halfbyte, json
        from halfbyte._runtime import dispatcher
        print(json.dumps([[c.name, c.ok, c.message] for c in dispatcher.plugins.doctor_checks()]))
    """
    assert ["acme tables", True, "byte table"] in printed(run(code))


def test_op_of_the_plugin_runs_on_the_plugin_and_on_the_reference(run):
    code = """
        import halfbyte, json, torch
        x = torch.arange(4.0)
        mine = torch.ops.acme.swap_pairs(x).tolist()
        half = torch.ops.acme.swap_pairs(x.half()).tolist()
        print(json.dumps([mine, half, halfbyte.explain("swap_pairs", x.half()).backend]))
    """
    assert printed(run(code)) == [[1.0, 0.0, 3.0, 2.0], [1.0, 0.0, 3.0, 2.0], "reference"]


def test_plugins_none_loads_neither(run):
    code = "import halfbyte, json; print(json.dumps([info.name for info in halfbyte.backends()]))"

    names = printed(run(code, HALFBYTE_PLUGINS="none"))

    assert not {"acme", "broken"} & set(names)
    assert "reference" in names


def test_broken_plugin_is_quarantined_beside_the_good_one(run):
    code = """
        import halfbyte, json
        print(json.dumps({info.name: [info.reasons, info.provider] for info in halfbyte.backends()}))
    """
    reason = "quarantined: ModuleNotFoundError: No module named 'broken_driver_that_nobody_has'"
    assert printed(run(code))["broken"] == [[reason], "halfbyte-broken 0.3"]


def test_broken_plugin_forced_raises_its_own_error_as_cause(run):
    code = """
        import halfbyte, json
        try:
            halfbyte.set_backend("broken")
        except halfbyte.BackendUnavailable as error:
            print(json.dumps([str(error), type(error.__cause__).__name__]))
    """
    reason = "ModuleNotFoundError: No module named 'broken_driver_that_nobody_has'"
    assert printed(run(code)) == [f"backend broken is quarantined: {reason}", "ModuleNotFoundError"]


@pytest.mark.parametrize("name", ["acme", "reference"])
def test_kit_passes_from_the_wheel(name, scratch, tmp_path):
    options = ("-q", "-p", "no:cacheprovider", "-p", "halfbyte.testing.plugin", "--backend", name, "--require", name)
    few = ("-k", "golden or limits or manners") if name == "reference" else ()  # the whole of it: tests/testing
    kit = ("--pyargs", "halfbyte.testing.checks")

    done = call(scratch, "-m", "pytest", "-rs", *options, *few, *kit, cwd=tmp_path)

    assert f"backend {name} on cpu: checks passed, by block size" in done.stdout
    if name == "acme":
        assert "variant byte: " in done.stdout
        assert "\nswap_pairs  " in done.stdout


def test_kit_refuses_the_broken_plugin(scratch, tmp_path):
    options = ("-p", "halfbyte.testing.plugin", "--backend", "broken", "--pyargs", "halfbyte.testing.checks")

    done = call(scratch, "-m", "pytest", *options, cwd=tmp_path, check=False)

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--backend broken: backend broken is quarantined: ModuleNotFoundError" in done.stderr
