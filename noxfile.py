"""The documented commands: nox -s demo, tests, lint, types, sanitize, triton, docs, bench, build, tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lint", "types"]

# Exactly this release: a range would fetch the newest CUDA build, several gigabytes.  Where PyPI is the only index,
# this too is a CUDA build; PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can name PyTorch's CPU wheels.
TORCH = "torch==2.13.0"


def install(session: nox.Session, *extras: str) -> None:
    """torch first, on its own line, then halfbyte with its CPU module."""
    session.install(TORCH)
    session.install(f".[{','.join(extras)}]", "-Ccmake.define.HALFBYTE_CUDA=OFF", "-Ccmake.define.HALFBYTE_HIP=OFF")


@nox.session
def demo(session: nox.Session) -> None:
    """Install halfbyte and quantize a real sentence-embedding model."""
    install(session, "demo")
    session.run("halfbyte", "doctor")
    session.run("halfbyte", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on the installed wheel; what the machine lacks is skipped with its reason."""
    install(session, "test")
    session.run("pytest", *(session.posargs or ["tests"]))


@nox.session
def lint(session: nox.Session) -> None:
    """ruff and clang-format."""
    session.install("ruff==0.17.*", "clang-format==23.*")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    listed = session.run("git", "ls-files", "csrc", external=True, silent=True) or ""
    sources = [name for name in listed.split() if name.endswith((".h", ".cpp", ".inc", ".cu", ".cuh"))]
    session.run("clang-format", "--dry-run", "--Werror", *sources)


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over core and backends."""
    session.install(TORCH)
    session.install("mypy==2.*", "pluggy", "numpy", "safetensors", "rich", "pytest")
    session.run("mypy")


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the CPU kernels without Python under the address and undefined-behavior sanitizers."""
    if shutil.which("g++") is None:
        session.skip("no g++")
    session.install("cmake", "ninja", "pybind11")
    pybind11 = str(session.run("python", "-m", "pybind11", "--cmakedir", silent=True)).strip()
    options = ["-DHALFBYTE_SANITIZE=ON", "-DHALFBYTE_CUDA=OFF", "-DHALFBYTE_HIP=OFF", "-DHALFBYTE_SYCL=OFF"]
    options += ["-DCMAKE_CXX_COMPILER=g++", f"-Dpybind11_DIR={pybind11}"]
    session.run("cmake", "-G", "Ninja", "-S", "csrc", "-B", "build/sanitize", *options)
    session.run("cmake", "--build", "build/sanitize", "--target", "halfbyte_cpu_check", "--parallel", "2")
    # GCC 12 with ASan's detection of returned stack frames faults in aligned AVX-512 accesses to its own locals.
    watch = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    session.run("build/sanitize/cpu/check/halfbyte_cpu_check", *session.posargs, env=watch, external=True)


@nox.session
@nox.parametrize("version", [nox.param("3.6.0", id="3.6"), nox.param("3.9.0", id="3.9")])
def triton(session: nox.Session, version: str) -> None:
    """Run every Triton kernel in the interpreter, and compile it ahead of time for each arch: no GPU is needed."""
    install(session, "test")
    session.install(f"triton=={version}", "pytest-xdist")
    # 3.9 warns where the variable is unset; the cache of the machine is not to hide what does not compile.
    variables = {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(Path(session.create_tmp()) / "triton")}
    session.run("pytest", "-n", "2", *(session.posargs or ["tests/backends/triton"]), env=variables)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages into docs/site; a warning is an error."""
    session.install("mkdocs==1.*", "mkdocs-material==9.*")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}  # a banner about other programs
    session.run("mkdocs", "build", "--strict", "--config-file", "docs/mkdocs.yml", env=quiet)


@nox.session
def bench(session: nox.Session) -> None:
    """Time halfbyte against bitsandbytes in alternating processes; positional arguments go to `halfbyte bench`."""
    install(session, "bench")
    session.run("halfbyte", "bench", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the sdist, and the wheel from it, into dist/."""
    session.install("build")
    session.run("python", "-m", "build", "--outdir", "dist", *session.posargs)


@nox.session
def tables(session: nox.Session) -> None:
    """Write csrc/include/halfbyte/tables.h anew from core/halfbyte/formats.py."""
    install(session)
    header = session.run("python", "-m", "halfbyte.formats", silent=True)
    with open("csrc/include/halfbyte/tables.h", "w", encoding="utf-8") as file:
        file.write(str(header))
