"""A conversion that is killed, interrupted or hindered: what it leaves, and what a rerun makes of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import halfbyte
from halfbyte.__main__ import main
from halfbyte.conversion import model_files, shard_writer
from halfbyte.conversion.convert import ConvertReport, Options, convert
from halfbyte.conversion.partial import partial_folder, partial_name

SHARDS, LAYERS = 5, 3
INCLUDE = r"w\d"


@pytest.fixture(autouse=True)
def _without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {
            f"layers.{shard}.w{layer}.weight": torch.randn(128, 128, generator=generator) for layer in range(LAYERS)
        }
        save_file(tensors | {f"layers.{shard}.norm": torch.ones(64)}, folder / file)
        weight_map |= dict.fromkeys([*tensors, f"layers.{shard}.norm"], file)
    (folder / "config.json").write_text(json.dumps({"model_type": "acme"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def run(model: Path, out: Path, format: str = "nf4", **more: Any) -> ConvertReport:
    return convert(model, out, Options(format, nested=format == "nf4"), include=[INCLUDE], **more)


def stop_at(count: int) -> Callable[[int, int, str], None]:
    """Ctrl-C after some layers."""

    def progress(done: int, total: int, name: str) -> None:
        if done == count:
            raise KeyboardInterrupt

    return progress


def interrupted(model: Path, out: Path, layers: int = LAYERS * 2 + 1) -> Path:
    """The partial folder of a run that was stopped."""
    with pytest.raises(KeyboardInterrupt):
        run(model, out, progress=stop_at(layers))
    return partial_name(out)


# -- killed --------------------------------------------------------------------------------------------------

# Children are forked from one process that has torch loaded: many kills cost one import.
_KILLED = """
import os, random, signal, sys, time
sys.modules["transformers"] = None
import torch
torch.set_num_threads(1)
from halfbyte.conversion.convert import Options, convert

model, out, seed, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
points = random.Random(seed)

def run(target, suicide=None):
    def progress(done, total, name):
        if done == suicide:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            how = dict(include=[r"w\\d"], jobs=jobs, progress=progress)
            report = convert(model, target, Options("nf4", nested=True), **how)
            print("resumed" if report.resumed else "whole", flush=True)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return child

started = time.monotonic()
assert os.waitpid(run(out + "-undisturbed"), 0)[1] == 0
whole = time.monotonic() - started
for attempt in range(40):
    if attempt < 2:  # after a random layer: however fast this machine is, there are two kills
        child = run(out, suicide=points.randrange(7 * attempt, 7 * (attempt + 1)))
    else:  # at any moment; later attempts get more time, so that the last one comes to its end
        child = run(out)
        time.sleep(points.uniform(0, whole * (0.2 + attempt / 20)))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.path.exists(out):
        print("kills", attempt)
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no SIGKILL and no fork")
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_points_ends_in_the_same_bytes(model: Path, tmp_path: Path, seed: int) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            _KILLED,
            str(model),
            str(tmp_path / "out"),
            str(seed),
            str(1 + seed % 2),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 2
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "out-undisturbed")
    # A kill between the last rename and the removal of the rest leaves a lock and a manifest, no weights.
    left = {path.name for path in tmp_path.iterdir()} - {"model", "out", "out-undisturbed"}
    assert left <= {".out.halfbyte-partial"}


def test_rerun_does_only_what_is_missing(model: Path, tmp_path: Path) -> None:
    whole = run(model, tmp_path / "whole")
    interrupted(model, tmp_path / "out")
    seen: list[tuple[int, int, str]] = []
    report = run(model, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen[0] == (LAYERS * 2, LAYERS * SHARDS, "layers.2.w0.weight")
    assert report.resumed == "2 finished shards of an earlier run used"
    assert report.layers == whole.layers
    assert report.bytes_after == whole.bytes_after
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert not partial_name(tmp_path / "out").exists()


def test_rerun_with_more_jobs_goes_on_too(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "whole")
    interrupted(model, tmp_path / "out")
    assert run(model, tmp_path / "out", jobs=3).resumed
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_rerun_with_other_options_starts_afresh(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "whole", "int8")
    interrupted(model, tmp_path / "out")
    report = run(model, tmp_path / "out", "int8")
    assert report.resumed == "an earlier run left shards, but its options differ, so the conversion starts afresh"
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_rerun_with_another_source_starts_afresh(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out")
    shard = model / "model-00001-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + bytes(4))
    assert "its source files differ" in run(model, tmp_path / "out").resumed
    run(model, tmp_path / "whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"finished": 3}', '{"finished": [{"file": "../x"}]}', '{"finished": [[]]}']
)
def test_rerun_with_a_damaged_manifest_starts_afresh(model: Path, tmp_path: Path, content: str) -> None:
    run(model, tmp_path / "whole")
    (interrupted(model, tmp_path / "out") / "manifest.json").write_text(content)
    assert "starts afresh" in run(model, tmp_path / "out").resumed
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_rerun_does_a_truncated_shard_again(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "whole")
    shard = interrupted(model, tmp_path / "out") / "files" / "model-00001-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(model, tmp_path / "out").resumed.startswith("1 finished")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


# -- interrupted ---------------------------------------------------------------------------------------------


def test_interrupt_keeps_finished_shards_and_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"1 finished shard stays in .*\.out\.halfbyte-partial, and the same"):
        run(model, tmp_path / "out", progress=stop_at(LAYERS + 1))
    assert set(os.listdir(partial_name(tmp_path / "out"))) == {"lock", "manifest.json", "files"}


def test_interrupt_before_the_first_shard_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", progress=stop_at(0))
    assert os.listdir(tmp_path) == ["model"]


def test_interrupt_of_the_command_is_one_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.conversion import convert as module

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "copy_companions", stop)
    arguments = ["quantize", str(model), str(tmp_path / "out"), "--format", "nf4", "--include", INCLUDE]
    assert main(arguments) == 130
    assert "5 finished shards stay in" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main([*arguments, "--jobs", "2"]) == 0
    assert "halfbyte: 5 finished shards of an earlier run used\n" in capsys.readouterr().err


# -- not alone -----------------------------------------------------------------------------------------------


def test_second_process_on_one_output_is_refused(model: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(partial_folder(tmp_path / "out", {}))
        with pytest.raises(halfbyte.InputError, match="another process is writing"):
            run(model, tmp_path / "out")
        assert partial_name(tmp_path / "out").is_dir()


def test_folder_of_somebody_else_is_not_touched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    partial = partial_name(tmp_path / "out")
    partial.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    with pytest.raises(halfbyte.InputError, match="is in the way"):
        run(model, tmp_path / "out")
    assert snapshot(tmp_path) == before
    partial.unlink()
    partial.mkdir()
    (partial / "thesis.txt").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(halfbyte.InputError, match="is in the way"):
        run(model, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_source_that_changes_meanwhile_is_refused(model: Path, tmp_path: Path) -> None:
    def touch(done: int, total: int, name: str) -> None:
        os.utime(model / "model-00001-of-00005.safetensors", ns=(0, done))

    with pytest.raises(halfbyte.InputError, match="changed during the conversion"):
        run(model, tmp_path / "out", progress=touch)
    assert os.listdir(tmp_path) == ["model"]


# -- hindered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("resumed", [False, True], ids=["first", "rerun"])
def test_failing_disk_is_one_sentence_and_leaves_nothing(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    resumed: bool,
) -> None:
    before = snapshot(tmp_path)
    if resumed:
        interrupted(model, tmp_path / "out")

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shard_writer.os, "fsync", fail)
    arguments = ["quantize", str(model), str(tmp_path / "out"), "--format", "nf4", "--nested", "--include", INCLUDE]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"halfbyte: {tmp_path / 'out'} cannot be written: {os.strerror(code).lower()}")
    assert told.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_disk_without_room_is_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda path: usage)
    seen: list[Any] = []
    with pytest.raises(halfbyte.errors.StorageError, match=r"needs \d+\.\d kB in .*, 100\.0 kB are free"):
        run(model, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert not seen
    assert os.listdir(tmp_path) == ["model"]


_MAIN = """
import sys
sys.modules["transformers"] = None
if sys.argv[1] != "0":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from halfbyte.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def command(model: Path, out: Path, limit: int = 0) -> list[str]:
    arguments = ["quantize", str(model), str(out), "--format", "nf4", "--include", INCLUDE]
    return [sys.executable, "-c", _MAIN, str(limit), *arguments]


def refused(arguments: list[str]) -> str:
    paths = os.pathsep.join(one for one in sys.path if one)
    done = subprocess.run(
        arguments, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("halfbyte: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there is no RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [9_000])
def test_file_too_large_for_the_system_leaves_nothing(model: Path, tmp_path: Path, limit: int) -> None:
    before = snapshot(tmp_path)
    assert "cannot be written: file too large" in refused(command(model, tmp_path / "out", limit))
    assert snapshot(tmp_path) == before


def in_mount(mount: str, arguments: list[str]) -> list[str]:
    """A command that sees another mount; a skip where this process may not mount."""
    script = f'{mount} && shift 0 && exec "$@"'
    probe = shutil.which("unshare") and subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, timeout=20
    )
    if not probe or probe.returncode:
        pytest.skip(f"mounting is not allowed here: {probe.stderr.strip() if probe else 'no unshare'}")
    return ["unshare", "-rm", "sh", "-c", script, "sh", *arguments]


def test_full_disk_is_told_with_what_is_needed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size=64k none '{tmp_path / 'small'}'"
    told = refused(in_mount(mount, command(model, tmp_path / "small" / "out")))
    assert "cannot be written: the conversion needs" in told
    assert re.search(r"needs 170\.\d kB in .*, 6\d\.\d kB are free", told)


def test_read_only_folder_is_told_with_what_would_work(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fixed"
    folder.mkdir()
    mount = f"mount --bind '{folder}' '{folder}' && mount -o remount,bind,ro '{folder}'"
    told = refused(in_mount(mount, command(model, folder / "out")))
    assert "read-only file system" in told
    assert "name an output in a folder that can be written to" in told
    assert os.listdir(folder) == []


def test_folder_without_permission_is_told_with_what_would_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Monkeypatched, because permission bits do not bind root."""
    mkdir = Path.mkdir

    def forbidden(self: Path, *args: Any, **more: Any) -> None:
        if self.name.endswith("-partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self, *args, **more)

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(halfbyte.errors.StorageError, match=r"permission denied .*name an output in a folder"):
        run(model, tmp_path / "out")


def test_unreadable_source_is_not_told_as_a_failing_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))

    monkeypatch.setattr(model_files.shutil, "copyfile", forbidden)
    with pytest.raises(PermissionError) as caught:
        run(model, tmp_path / "out")
    assert not isinstance(caught.value, halfbyte.HalfbyteError)
    assert os.listdir(tmp_path) == ["model"]
