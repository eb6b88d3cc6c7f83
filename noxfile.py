"""The documented commands: nox -s demo, tests, full, lint, types, sanitize, cuda, hip, triton, sycl, ipex, docs,
bench, build, tables.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lint", "types"]

# Exactly this release: a range would fetch the newest CUDA build, several gigabytes.  Where PyPI is the only index,
# this too is a CUDA build; PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can name PyTorch's CPU wheels.
TORCH = "torch==2.13.0"


def install(session: nox.Session, *extras: str, **defines: str) -> None:
    """torch first, on its own line, then halfbyte with its CPU module and what `defines` adds."""
    session.install(TORCH)
    options = {"HALFBYTE_CUDA": "OFF", "HALFBYTE_HIP": "OFF", "HALFBYTE_SYCL": "OFF", **defines}
    project = f".[{','.join(extras)}]" if extras else "."
    session.install(project, *(f"-Ccmake.define.{name}={value}" for name, value in options.items()))


@nox.session
def demo(session: nox.Session) -> None:
    """Install halfbyte and quantize a real sentence-embedding model."""
    install(session, "demo")
    session.run("halfbyte", "doctor")
    session.run("halfbyte", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on the installed wheel, with the GPU kernels emulated; what is missing is a skip that says so."""
    install(session, "test", HALFBYTE_EMULATE="ON")
    session.run("pytest", *(session.posargs or ["tests"]))


@nox.session
def full(session: nox.Session) -> None:
    """Run the tests that are too long for every day: all of fine-tuning beside bitsandbytes, and its own tests."""
    install(session, "test")
    if "HALFBYTE_BNB_TESTS" in os.environ:
        session.install("lion-pytorch")
    session.run("pytest", "-m", "full", *(session.posargs or ["tests"]))


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
    compile_native(session, "sanitize", "halfbyte_cpu_check", HALFBYTE_SANITIZE="ON", CMAKE_CXX_COMPILER="g++")
    # GCC 12 with ASan's detection of returned stack frames faults in aligned AVX-512 accesses to its own locals.
    watch = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    session.run("build/sanitize/cpu/check/halfbyte_cpu_check", *session.posargs, env=watch, external=True)


def compile_native(session: nox.Session, folder: str, target: str, **defines: str) -> None:
    """One CMake target, without Python's packaging, in build/<folder>."""
    pybind11 = str(session.run("python", "-m", "pybind11", "--cmakedir", silent=True)).strip()
    found = {"HALFBYTE_CUDA": "OFF", "HALFBYTE_HIP": "OFF", "HALFBYTE_SYCL": "OFF", "pybind11_DIR": pybind11, **defines}
    options = [f"-D{name}={value}" for name, value in found.items()]
    session.run("cmake", "-G", "Ninja", "-S", "csrc", "-B", f"build/{folder}", *options)
    session.run("cmake", "--build", f"build/{folder}", "--target", target, "--parallel", "2")


@nox.session
def cuda(session: nox.Session) -> None:
    """Compile the CUDA module, for the architectures given or sm_90a, and import it without a driver."""
    session.install("cmake", "ninja", "pybind11")
    if os.environ.get("HALFBYTE_PIP_NVCC"):
        with open("pyproject.toml", "rb") as file:
            overrides = tomllib.load(file)["tool"]["scikit-build"]["overrides"]
        (wheels,) = (one["build"]["requires"] for one in overrides if "HALFBYTE_PIP_NVCC" in one["if"].get("env", {}))
        session.install(*wheels)
    elif shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        session.skip("no nvcc; HALFBYTE_PIP_NVCC=1 fetches it from PyPI")
    archs = ";".join(session.posargs) or "90a-real"
    compile_native(session, "cuda", "halfbyte_cuda_module", HALFBYTE_CUDA="ON", CMAKE_CUDA_ARCHITECTURES=archs)
    session.run("python", "tests/backends/gpu/check_module.py", "build/cuda/cuda/halfbyte_cuda_module", archs)


@nox.session
def hip(session: nox.Session) -> None:
    """Compile the ROCm module, for the architectures given or gfx90a and gfx942, and import it without a GPU."""
    compiler = os.environ.get("HIPCXX") or shutil.which("clang++-19") or shutil.which("amdclang++")
    libraries = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
    if compiler is None:
        session.skip("no HIP compiler: HIPCXX names none, and there is neither clang++-19 nor amdclang++")
    session.install("cmake", "ninja", "pybind11")
    archs = session.posargs or ["gfx90a", "gfx942"]
    flags = {}
    if libraries.exists():  # Debian's, where HIP lies in /usr
        if not Path("/usr/include/hip/hip_runtime.h").exists():
            session.skip("no HIP headers: apt-get install libamdhip64-dev")
        folder = stand_ins(session, libraries, archs)
        flags["CMAKE_HIP_FLAGS"] = f"--rocm-path=/usr --rocm-device-lib-path={folder} -Wno-linker-warnings"
    session.env["HIPCXX"] = compiler
    compile_native(
        session, "hip", "halfbyte_rocm_module", HALFBYTE_HIP="ON", CMAKE_HIP_ARCHITECTURES=";".join(archs), **flags
    )
    session.run("python", "tests/backends/gpu/check_module.py", "build/hip/hip/halfbyte_rocm_module", ";".join(archs))


def stand_ins(session: nox.Session, libraries: Path, archs: list[str]) -> Path:
    """Debian's device libraries, and for architectures newer than them the one file that they lack.

    It holds a number, so what is compiled with it is good for a check and never to be shipped.
    """
    folder = Path("build/hip-libraries").absolute()
    shutil.copytree(libraries, folder, dirs_exist_ok=True)
    for arch in archs:
        name = arch.removeprefix("gfx")
        made = folder / f"oclc_isa_version_{name}.bc"
        if made.exists():
            continue
        number = int(name[:-2]) * 1000 + int(name[-2], 16) * 100 + int(name[-1], 16)
        (folder / "isa.ll").write_text(
            'target triple = "amdgcn-amd-amdhsa"\n'
            "@__oclc_ISA_version = linkonce_odr protected local_unnamed_addr addrspace(4) "
            f"constant i32 {number}, align 4\n"
        )
        session.run("llvm-as-19", str(folder / "isa.ll"), "-o", str(made), external=True)
    return folder


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
def sycl(session: nox.Session) -> None:
    """Run the SYCL kernels on the CPU, through Intel's OpenCL runtime from PyPI (1.5 GB unpacked)."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        session.skip("Intel's OpenCL runtime for CPUs is one for Linux on x86-64")
    session.install("intel-sycl-rt==2026.2.*", "intel-opencl-rt==2026.2.*")
    install(session, HALFBYTE_SYCL="ON")
    session.install("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis>=6.100")
    # The runtime's own file of OpenCL devices holds a placeholder for its path, and other devices are not to be found.
    runtime = Path(session.virtualenv.location).absolute() / "lib" / "libintelocl.so"
    variables = {"OCL_ICD_FILENAMES": str(runtime), "OCL_ICD_VENDORS": "/nonexistent"}
    # The tests skip where a piece is missing; here none may be.
    session.run("python", "-c", "import torch; from halfbyte_xpu import _C; assert _C.devices()", env=variables)
    session.run("pytest", "-n", "2", *(session.posargs or ["tests/backends/xpu"]), env=variables)


@nox.session
def ipex(session: nox.Session) -> None:
    """Test the adapter of intel-extension-for-pytorch on its CPU build, with the torch that it needs (several GB)."""
    session.install("torch==2.8.0", "intel-extension-for-pytorch==2.8.0")
    off = (f"-Ccmake.define.HALFBYTE_{name}=OFF" for name in ("CUDA", "HIP", "SYCL"))
    session.install(".", "pytest>=8", "pytest-timeout", "hypothesis>=6.100", *off)
    session.run("pytest", *(session.posargs or ["tests/backends/xpu/test_xpu_ipex.py"]))


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
