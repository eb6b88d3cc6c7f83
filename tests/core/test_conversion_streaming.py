"""Conversion in bounded memory: the bytes of safetensors' own writer, in any number of threads."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte import functional
from halfbyte.conversion.checkpoint import read_header
from halfbyte.conversion.convert import Options, convert
from halfbyte.conversion.jobs import divided_threads, each
from halfbyte.conversion.shard_reader import ShardReader
from halfbyte.conversion.shard_writer import ShardWriter
from halfbyte.nn.params8bit import quantize_rows_as_fp16

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.float16, torch.bfloat16),
    *(torch.uint32, torch.int32, torch.float32, torch.uint64, torch.int64, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.fixture(autouse=True)
def _without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def make_model(folder: Path, shards: int = 2, layers: int = 3, size: int = 96) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {
            f"layers.{shard}.{layer}.weight": torch.randn(size, 64, generator=generator).bfloat16()
            for layer in range(layers)
        }
        tensors[f"layers.{shard}.norm"] = torch.randn(size, generator=generator)
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps({"model_type": "acme"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# -- the writer ----------------------------------------------------------------------------------------------


def of_every_kind() -> dict[str, torch.Tensor]:
    """All dtypes, no elements, no dimensions, odd lengths and names that JSON spells in its own way."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, dtype in enumerate(DTYPES):
        bits = torch.randint(0, 2, (index * 7 + 3,), generator=generator)
        tensors[f"layer.{index % 3}.{index}"] = bits.to(dtype)
    names = ["", "a", "B", "é", "☃ \U0001f600", 'quote"', "back\\slash", "line\nbreak\t\x00\x1f\x7f", "a/b", "ﬀ"]
    tensors |= {name: torch.full((3, 5), float(len(name))) for name in names}
    return tensors | {
        "scalar": torch.tensor(1.5),
        "none": torch.empty(0, 4),
        "byte": torch.tensor(3, dtype=torch.uint8),
    }


@pytest.mark.parametrize("later", [False, True], ids=["spooled", "read later"])
def test_writer_writes_what_safetensors_writes(tmp_path: Path, later: bool) -> None:
    tensors = of_every_kind()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    stored = read_header(tmp_path / "theirs")
    reader = ShardReader(tmp_path / "theirs")
    with ShardWriter(tmp_path / "spool") as writer:
        for name in sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if later:
                writer.add_later(name, stored[name], lambda name=name: reader.read(name, stored[name].nbytes))  # type: ignore[misc]
            else:
                writer.add(name, tensors[name])
        writer.write(tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert not (tmp_path / "spool").exists()


def test_writer_writes_an_empty_file_as_safetensors_does(tmp_path: Path) -> None:
    save_file({}, tmp_path / "theirs", metadata={"format": "pt"})
    with ShardWriter(tmp_path / "spool") as writer:
        writer.write(tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("options", [Options("nf4"), Options("fp4", nested=True), Options("int8")])
def test_conversion_writes_what_safetensors_would_write(tmp_path: Path, options: Options) -> None:
    convert(make_model(tmp_path / "model"), tmp_path / "out", options, include=[r"\d"])
    for path in (tmp_path / "out").glob("*.safetensors"):
        save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("overflows", [False, True])
def test_int8_some_rows_at_a_time_is_int8_of_the_whole(tmp_path: Path, overflows: bool) -> None:
    """Three slabs; a value that float16 cannot hold in the last one decides for all."""
    weight = torch.randn(2500, 1000, generator=torch.Generator().manual_seed(0))
    weight[-1, -1] = 1e5 if overflows else 1.0
    (tmp_path / "model").mkdir()
    save_file({"a.weight": weight}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    report = convert(tmp_path / "model", tmp_path / "out", Options("int8"), include=["a"])
    found = load_file(tmp_path / "out" / "model.safetensors")
    codes, absmax = quantize_rows_as_fp16(weight)
    assert torch.equal(found["a.weight"], codes)
    assert torch.equal(found["a.SCB"], absmax)
    restored = functional.dequantize_int8(codes, absmax)
    assert report.layers[0].error == pytest.approx(float((weight - restored).norm() / weight.norm()), rel=1e-4)


# -- jobs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [Options("nf4", nested=True), Options("int8")])
def test_jobs_write_the_same_bytes(tmp_path: Path, options: Options) -> None:
    model = make_model(tmp_path / "model", layers=8)
    reports = [convert(model, tmp_path / str(jobs), options, include=[r"\d"], jobs=jobs) for jobs in (1, 2, 5)]
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "5")
    assert [layer.module for layer in reports[0].layers] == [layer.module for layer in reports[2].layers]


def test_jobs_keep_the_callers_choice_of_backend(tmp_path: Path, stub_backend: Callable[..., Any]) -> None:
    stub = stub_backend("acme")
    with halfbyte.use_backend("acme"):
        convert(make_model(tmp_path / "model"), tmp_path / "out", Options("nf4"), include=[r"\d"], jobs=2)
    assert stub.calls.count("quantize_4bit") == 6


@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_tell_progress_in_order(tmp_path: Path, jobs: int) -> None:
    seen: list[tuple[int, int, str]] = []
    convert(
        make_model(tmp_path / "model"),
        tmp_path / "out",
        Options("nf4"),
        include=[r"\d"],
        jobs=jobs,
        progress=lambda *step: seen.append(step),
    )
    counts = [done for done, _, _ in seen]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 6)


@pytest.mark.parametrize("jobs", [0, -1, 257])
def test_jobs_out_of_range_are_refused(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(halfbyte.InputError, match=f"jobs must be from 1 to 256; got {jobs}"):
        convert(tmp_path, tmp_path / "out", Options("nf4"), jobs=jobs)


def test_jobs_stop_at_the_first_error() -> None:
    done: list[int] = []
    here = threading.Barrier(2)

    def work(item: int) -> None:
        if item < 2:
            here.wait(10)
        if item == 0:
            raise ValueError("zero")
        done.append(item)

    with pytest.raises(ValueError, match="zero"):
        each(range(100_000), lambda: work, 2)
    assert len(done) < 100_000


def test_jobs_divide_the_threads_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        found: list[int] = []
        with divided_threads(2):
            each(range(2), lambda: lambda _: found.append(torch.get_num_threads()), 2)
        assert found == [2, 2]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


# -- memory --------------------------------------------------------------------------------------------------

# The peak of a conversion alone: a tiny one first, for what is loaded and allocated once; then Linux's high-water mark
# is set back ("5" to clear_refs), so that the import of torch does not hide it.
_PEAK = """
import sys
sys.modules["transformers"] = None
import torch
torch.set_num_threads(1)
from halfbyte.conversion.convert import Options, convert

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

tiny, model, out, format, nested, jobs = sys.argv[1:]
options = Options(format, nested=nested == "True")
convert(tiny, out + "-tiny", options, include=["w.*"], jobs=int(jobs))
before = status("VmRSS:")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
convert(model, out, options, include=["w.*"], jobs=int(jobs))
print(before, status("VmHWM:"))
"""

COLUMNS = 2048
MB = 1 << 20
# Set to 1, it adds the 4 GB model: HALFBYTE_TEST_LARGE=1 pytest tests/core/test_conversion_streaming.py -k memory
LARGE = "HALFBYTE_TEST_LARGE"
SIZES = [256, 4096] if os.environ.get(LARGE) == "1" else [256]

# What one job may hold: the stored tensor, its half or float copy, codes, masks.  The constant: the mapped window of
# 32 MB, the slabs in which the error is measured, and what the allocator keeps.
COPIES, CONSTANT = 4, 64 * MB


def make_large(folder: Path, total: int, tensor: int, shards: int = 4) -> Path:
    """`total` bytes of bfloat16 layers of `tensor` bytes each."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    weight = torch.randn(tensor // 2 // COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {f"layers.{shard}.w{index}.weight": weight.clone() for index in range(total // tensor // shards)}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps({"model_type": "acme"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder = tmp_path_factory.mktemp("large")

    def get(megabytes: int) -> Path:
        path = folder / str(megabytes)
        return path if path.exists() else make_large(path, megabytes * MB, 16 * MB)

    make_large(folder / "tiny", 4 * 16_384, 16_384)
    return get


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can set the peak back")
@pytest.mark.parametrize("megabytes", SIZES)
@pytest.mark.parametrize(
    ("format", "nested", "jobs"), [("nf4", False, 1), ("nf4", True, 2), ("int8", False, 1)], ids=str
)
def test_memory_is_bounded_by_the_largest_tensor(
    large: Callable[[int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    megabytes: int,
    format: str,
    nested: bool,
    jobs: int,
) -> None:
    model = large(megabytes)
    arguments = (model.parent / "tiny", model, tmp_path / "out", format, nested, jobs)
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    bound = jobs * COPIES * 16 * MB + CONSTANT
    with capsys.disabled():
        print(
            f"\n{megabytes} MB of bfloat16 to {format}{' nested' * nested}, {jobs} job(s): peak {peak / MB:.0f} MB, "
            f"{(peak - before) / MB:.0f} MB above the {before / MB:.0f} MB before (bound {bound / MB:.0f} MB)"
        )
    assert peak - before < bound
