"""`halfbyte run` is Python with the drop-in on: arguments, path, end and children are the script's."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

# The console script, and `python -m halfbyte`.
ENTRIES = {
    "script": ("-c", "import sys; sys.argv[0] = 'halfbyte'; from halfbyte_boot.run import main; sys.exit(main())"),
    "module": ("-m", "halfbyte"),
}


@pytest.fixture(scope="module")
def starters() -> None:
    """Children are reached through halfbyte.pth only."""
    try:
        files = [str(file) for file in importlib.metadata.files("halfbyte") or []]
    except importlib.metadata.PackageNotFoundError:
        files = []
    if "halfbyte.pth" not in files:
        pytest.skip("halfbyte is not installed, only on the path")


@pytest.fixture
def call(tmp_path: Path) -> Run:
    """`call("run", "script.py")` in a scratch folder; `entry` says how halfbyte is started."""

    def call(*words: str, entry: str = "script", flags: tuple[str, ...] = (), **more: Any) -> Any:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HALFBYTE_")}
        path = [one for one in sys.path if one]
        return subprocess.run(
            [sys.executable, *flags, *ENTRIES[entry], *words],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **more},
            capture_output=True,
            text=True,
            timeout=200,
        )

    return call


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., None]:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))

    return write


SHOW = """
import json, os, sys
print(json.dumps([__name__, sys.argv, sys.path[0], os.environ["HALFBYTE_BITSANDBYTES"], __file__]))
"""


@pytest.mark.parametrize("entry", ENTRIES)
def test_script_sees_what_python_would_show_it(call, write, tmp_path, entry):
    write("folder/script.py", SHOW)
    arguments = ["--help", "-m", "--", "run", "--version", ""]

    done = call("run", "folder/script.py", *arguments, entry=entry)

    file = os.path.join("folder", "script.py")
    assert done.stderr == ""
    assert json.loads(done.stdout) == ["__main__", [file, *arguments], str(tmp_path / "folder"), "1", file]
    assert done.returncode == 0


@pytest.mark.parametrize("entry", ENTRIES)
def test_module_sees_what_python_would_show_it(call, write, tmp_path, entry):
    write("package/__init__.py", "")
    write("package/__main__.py", "from . import __name__ as name\n" + SHOW)

    done = call("run", "-m", "package", "-m", "--x", entry=entry)

    file = str(tmp_path / "package/__main__.py")
    assert done.stderr == ""
    assert json.loads(done.stdout) == ["__main__", [file, "-m", "--x"], str(tmp_path), "1", file]


def test_folder_runs_its_main_module(call, write):
    write("app/other.py", "print('found')")
    write("app/__main__.py", "import other, sys; print(sys.argv)")

    assert call("run", "app", "x").stdout == "found\n['app', 'x']\n"


def test_safe_path_is_kept(call, write):
    write("folder/script.py", "import sys; print(any(one.endswith('folder') for one in sys.path))")

    assert call("run", "folder/script.py", flags=("-P",)).stdout == "False\n"


def test_nothing_is_imported_before_the_script(call, write):
    write("script.py", "import sys; print({'torch', 'halfbyte', 'argparse'} & sys.modules.keys())")

    assert call("run", "script.py").stdout == "set()\n"


@pytest.mark.parametrize("entry", ENTRIES)
def test_bitsandbytes_is_halfbyte(call, write, foreign, entry):
    write("script.py", "import sys; sys.path.append(sys.argv[1]); import bitsandbytes; print(bitsandbytes.__version__)")

    assert call("run", "script.py", str(foreign), entry=entry).stdout == "0.50.2\n"


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('no data')", 1, "no data\n"),
        ("open('missing')", 1, "FileNotFoundError: [Errno 2] No such file or directory: 'missing'\n"),
        ("import halfbyte; raise halfbyte.InputError('mine')", 1, "halfbyte.errors.InputError: mine\n"),
    ],
)
def test_end_is_the_script_s(call, write, entry, end, code, said):
    write("script.py", f"import sys\n\n{end}\n")

    done = call("run", "script.py", entry=entry)

    assert done.returncode == code
    assert done.stderr.endswith(said)
    if "Error" in said:
        assert done.stderr.startswith("Traceback (most recent call last):\n")
        assert 'script.py", line 3, in <module>\n' in done.stderr
    else:
        assert done.stderr == said


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("entry", ENTRIES)
def test_interrupt_ends_it_like_python(call, write, entry):
    set_up = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # not there where a parent ignores the signal
    send = "os.kill(os.getpid(), signal.SIGINT)"
    write("script.py", f"import os, signal, time\n{set_up}\n{send}\ntime.sleep(60)\n")

    done = call("run", "script.py", entry=entry)

    assert done.returncode == -signal.SIGINT
    assert done.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.py"], "halfbyte: there is no script 'missing.py'\n"),
        (["-m", "missing"], "halfbyte: there is no module 'missing'\n"),
        (["-m", "missing.part"], "halfbyte: there is no module 'missing.part'\n"),
        (["-m", "json.missing"], "halfbyte: there is no module 'json.missing'\n"),
    ],
)
def test_target_that_is_not_there_is_said_in_a_sentence(call, entry, words, said):
    done = call("run", *words, entry=entry)

    assert (done.returncode, done.stderr) == (2, said)


def test_missing_import_of_a_module_is_its_own_error(call, write):
    write("package/__init__.py", "import what_nobody_has")
    write("package/part.py", "")

    done = call("run", "-m", "package.part")

    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'what_nobody_has'\n")


@pytest.mark.parametrize("words", [[], ["-m"], ["--unknown", "script.py"]])
@pytest.mark.parametrize("entry", ENTRIES)
def test_wrong_usage_exits_with_2(call, words, entry):
    done = call("run", *words, entry=entry)

    assert done.returncode == 2
    assert done.stderr.startswith("usage: halfbyte ")


def test_other_commands_are_reached_through_the_console_script(call):
    done = call("--version")

    assert done.stdout.startswith("halfbyte ")


def test_spawned_worker_unpickles_the_script_s_functions_and_imports_halfbyte(starters, call, write):
    write(
        "script.py",
        """
        import multiprocessing

        class Job:
            def __call__(self):
                import bitsandbytes
                return bitsandbytes.__version__, hasattr(bitsandbytes, "__halfbyte_version__")

        def work(job):
            return job()

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(work, [Job()]))
        """,
    )
    done = call("run", "script.py")

    assert (done.stdout, done.stderr) == ("[('0.50.2', True)]\n", "")


TRAIN = """
import os, sys
import bitsandbytes
print("rank", os.environ["RANK"] if "RANK" in os.environ else "none", sys.argv[1:], bitsandbytes.__halfbyte_version__)
"""


def test_worker_of_torchrun_imports_halfbyte(starters, call, write):
    write("train.py", TRAIN)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")

    done = call("run", *launch, "train.py", "--lr", "1")

    assert "rank 0 ['--lr', '1'] 0." in done.stdout, done.stderr


def test_child_of_accelerate_launch_imports_halfbyte(starters, call, write):
    pytest.importorskip("accelerate")
    write("train.py", TRAIN)
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")

    done = call("run", *launch, "--mixed_precision", "no", "--dynamo_backend", "no", "train.py", "--lr", "1")

    assert "rank none ['--lr', '1'] 0." in done.stdout, done.stderr


# -- python -m bitsandbytes ----------------------------------------------------------------------------------


def test_python_m_bitsandbytes_is_doctor(starters, call, tmp_path):
    done = call("run", "-m", "bitsandbytes", "--json")
    assert json.loads(done.stdout)["versions"]["halfbyte"]
    assert done.returncode == 0, done.stdout

    code = (
        "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-m', 'bitsandbytes', '--what']).returncode)"
    )
    (tmp_path / "script.py").write_text(code)
    done = call("run", "script.py")
    assert done.returncode == 2
    assert "usage: halfbyte" in done.stderr
