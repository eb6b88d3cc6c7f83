"""Whatever a model folder holds: a sentence or a right answer, and no more memory than its files justify."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from halfbyte import QuantState, functional
from halfbyte.conversion.checkpoint import read_checkpoint, read_header
from halfbyte.conversion.convert import Options, convert
from halfbyte.conversion.estimate import estimate
from halfbyte.conversion.plan import make_plan
from halfbyte.errors import HalfbyteError

TENSORS = {
    "a.weight": torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "a.bias": torch.ones(6),
    "steps": torch.tensor(3),
}
WHOLE = save(TENSORS, metadata={"format": "pt"})
HEADER = 8 + int.from_bytes(WHOLE[:8], "little")

# JSON of n bytes takes some dozen bytes of Python objects for each; the constant is what any reading takes.
PER_BYTE, CONSTANT = 100, 500_000

big = st.sampled_from([0, 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**4000, -1, -(2**63)])
scalars = st.none() | st.booleans() | big | st.integers() | st.text(max_size=5) | st.floats()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture(autouse=True)
def _without_transformers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="it builds the model")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def model_of(folder: Path, shard: bytes = WHOLE, config: object = None, index: object = None) -> Path:
    """A fresh model folder."""
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    (model / "config.json").write_text(json.dumps({} if config is None else config))
    if index is not None:
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / ("model.safetensors" if index is None else "m.safetensors")).write_bytes(shard)
    return model


def file_of(header: object, nbytes: int = 0) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(nbytes)


@contextlib.contextmanager
def justified_by(model: Path) -> Iterator[None]:
    """Python's own allocations, which are those of the readers: torch has no part in them."""
    size = sum(path.stat().st_size for path in model.iterdir())
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < CONSTANT + PER_BYTE * size


def converted(folder: Path, model: Path, options: Options) -> bool:
    """Whether it went through; after a refusal nothing is left."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert(model, out, options, include=[".*"], skip=["steps"])
    except (HalfbyteError, OSError):
        assert sorted(os.listdir(folder)) == ["model"]
        return False
    for path in out.glob("*.safetensors"):
        load_file(path)
    return True


# -- whole conversions of damaged files ----------------------------------------------------------------------


@settings(max_examples=120)
@given(
    flips=st.lists(st.tuples(st.integers(0, HEADER + 20), st.integers(0, 7)), max_size=4),
    cut=st.none() | st.integers(0, len(WHOLE)),
    format=st.sampled_from(["nf4", "int8"]),
)
def test_damaged_file_is_converted_or_refused(
    folder: Path, flips: list[tuple[int, int]], cut: int | None, format: str
) -> None:
    damaged = bytearray(WHOLE)
    for position, bit in flips:
        damaged[position] ^= 1 << bit
    model = model_of(folder, bytes(damaged[:cut]))
    went = converted(folder, model, Options(format))
    assert went or flips or cut is not None


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "U8", "BOOL", "C64", "F8_E8M0", "F4", "", "O"]) | values,
        "shape": st.lists(big | st.integers(0, 9), max_size=5) | values,
        "data_offsets": st.lists(big | st.integers(0, 99), min_size=2, max_size=2) | values,
    }
)
headers = st.dictionaries(st.sampled_from(["a.weight", "a.bias", "b", ""]) | st.text(max_size=5), entries, max_size=4)


@settings(max_examples=120)
@given(header=headers, metadata=st.none() | values, size=st.integers(0, 99))
def test_header_of_anything_is_converted_or_refused(folder: Path, header: Any, metadata: Any, size: int) -> None:
    model = model_of(folder, file_of({**({} if metadata is None else {"__metadata__": metadata}), **header}, size))
    with justified_by(model), contextlib.suppress(HalfbyteError, OSError):
        read_checkpoint(model)
    converted(folder, model, Options("nf4"))


@settings(max_examples=120)
@given(data=st.data())
def test_header_that_agrees_with_itself_is_converted_or_refused(folder: Path, data: st.DataObject) -> None:
    """Offsets that fit dtypes and shapes, so that the conversion itself is reached."""
    header, end = {}, 0
    for name in data.draw(st.lists(st.sampled_from(["a.weight", "b.weight", "b", "c.bias", "é"]), unique=True)):
        shape = data.draw(st.lists(st.integers(0, 9) | st.just(64), max_size=3))
        dtype, size = data.draw(st.sampled_from([("BF16", 2), ("F32", 4), ("U8", 1), ("I64", 8), ("F8_E4M3", 1)]))
        nbytes = torch.Size(shape).numel() * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    converted(folder, model_of(folder, file_of(header, end)), Options(data.draw(st.sampled_from(["nf4", "int8"]))))


@settings(max_examples=80)
@given(
    index=values
    | st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.sampled_from(list(TENSORS)), values | st.just("m.safetensors"))},
        optional={"metadata": values},
    )
)
def test_index_of_anything_is_converted_or_refused(folder: Path, index: object) -> None:
    model = model_of(folder, index=0 if index is None else index)
    with justified_by(model), contextlib.suppress(HalfbyteError, OSError):
        read_checkpoint(model)
    converted(folder, model, Options("nf4"))


@settings(max_examples=80)
@given(config=st.dictionaries(st.sampled_from(["quantization_config", "model_type", "architectures", "x"]), values))
def test_config_of_anything_is_converted_or_refused(folder: Path, config: object) -> None:
    converted(folder, model_of(folder, config=config), Options("nf4"))


@pytest.mark.parametrize("depth", [100, 480, 900, 980, 100_000])
def test_config_of_any_depth_is_converted_or_refused(folder: Path, depth: int) -> None:
    model = model_of(folder)
    (model / "config.json").write_text('{"x":' * depth + "1" + "}" * depth)
    converted(folder, model, Options("nf4"))


@pytest.mark.parametrize("raw", [b"[" * 300_000, b"[" + b"[]," * 100_000 + b"[]]", b'{"a":' * 50_000, b"1" * 300_000])
def test_header_of_many_parts_takes_memory_in_proportion(folder: Path, raw: bytes) -> None:
    model = model_of(folder, len(raw).to_bytes(8, "little") + raw)
    with justified_by(model), contextlib.suppress(HalfbyteError):
        read_checkpoint(model)


# -- shapes that lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [[2**62, 0], [0, 2**62], [2**62, 2**62, 0], [10**4000, 10**4000], [2**32, 2**32], [1] * 65, [2] * 1000, [2**63]],
    ids=lambda shape: f"{len(shape)} sizes of {min(shape[0], 2**64)}",
)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_shape_that_claims_too_much_is_refused_or_copied(folder: Path, shape: list[int], format: str) -> None:
    header = {"a.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}
    with pytest.raises(HalfbyteError):
        convert(model_of(folder, file_of(header)), folder / "out", Options(format), include=["a"])
    assert os.listdir(folder) == ["model"]


# -- memory of a whole process -------------------------------------------------------------------------------

_LIMITED = """
import resource, sys
sys.modules["transformers"] = None
import torch
torch.set_num_threads(1)
from halfbyte.__main__ import main
import halfbyte.conversion.convert, halfbyte.conversion.estimate, rich.progress, rich.table
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
for line in sys.stdin:
    folder = line.strip()
    for command in (["quantize", folder, folder + "-out", "--format", "int8"], ["estimate", folder]):
        print("code", main([*command, "--include", "a"]), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says what is mapped")
def test_hostile_folders_are_refused_in_400_megabytes(tmp_path: Path) -> None:
    """Files with holes: large to look at, small on the disk."""

    def model(name: str, shard: bytes = WHOLE, config: str = "{}") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_bytes(shard)
        return folder

    tera = 1 << 40
    try:
        os.truncate(model("config") / "config.json", tera)
        os.truncate(model("header", (10**11).to_bytes(8, "little")) / "model.safetensors", tera)
        os.truncate(model("zeros", (2**26).to_bytes(8, "little")) / "model.safetensors", tera)
    except OSError as error:
        pytest.skip(f"no file with a hole of 1 TB here: {error}")
    for name, shape in {"rows": [2**40, 0], "columns": [0, 2**40], "large": [2**40, 2**10]}.items():
        model(name, file_of({"a.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}))
    index = model("index")
    (index / "model.safetensors").unlink()
    (index / "model.safetensors.index.json").write_text("{}")
    os.truncate(index / "model.safetensors.index.json", tera)
    folders = [path for path in sorted(tmp_path.iterdir()) if path.is_dir()]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED],
        input="".join(f"{path}\n" for path in folders),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["code 2"] * 2 * len(folders) + [""], done.stderr
    assert "emory" not in done.stderr
    assert sorted(path for path in tmp_path.iterdir()) == folders


# -- quantization states -------------------------------------------------------------------------------------


def state(nested: bool) -> dict[str, Any]:
    _, made = functional.quantize_4bit(TENSORS["a.weight"], nested=nested)
    return made.as_dict(packed=True)


STATES = {nested: state(nested) for nested in (False, True)}
BLOB = "quant_state.bitsandbytes__nf4"


def read_or_refuse(entries: dict[str, Any]) -> QuantState | None:
    size = sum(entry.nbytes for entry in entries.values() if isinstance(entry, torch.Tensor))
    tracemalloc.start()
    try:
        read = QuantState.from_dict(entries)
    except HalfbyteError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < CONSTANT + PER_BYTE * size
    return read


def as_blob(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)


@settings(max_examples=150)
@given(
    nested=st.booleans(),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 7)), max_size=3),
    cut=st.none() | st.integers(0, 300),
)
def test_damaged_state_is_read_or_refused(nested: bool, flips: list[tuple[int, int]], cut: int | None) -> None:
    text = bytearray(STATES[nested][BLOB].numpy().tobytes())
    for position, bit in flips:
        text[position % len(text)] ^= 1 << bit
    read_or_refuse({**STATES[nested], BLOB: as_blob(bytes(text[:cut]))})


@settings(max_examples=150)
@given(
    nested=st.booleans(),
    changes=st.dictionaries(
        st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset", "x"]),
        values | st.lists(big, max_size=4),
        max_size=3,
    ),
)
def test_state_of_anything_is_read_or_refused(nested: bool, changes: dict[str, Any]) -> None:
    plain = json.loads(STATES[nested][BLOB].numpy().tobytes())
    read = read_or_refuse({**STATES[nested], BLOB: as_blob(json.dumps({**plain, **changes}).encode())})
    if read is not None and read.shape is not None:
        assert read.shape.numel() <= 64 * read.absmax.numel() * 64


tensors = st.builds(
    lambda dtype, shape: torch.zeros(shape, dtype=dtype),
    st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
    st.lists(st.integers(0, 17), max_size=2),
)


@settings(max_examples=100)
@given(
    nested=st.booleans(),
    changes=st.dictionaries(
        st.sampled_from(["absmax", "quant_map", "nested_absmax", "nested_quant_map", BLOB, "quant_state.x"]),
        tensors | values,
        max_size=3,
    ),
    missing=st.sets(st.sampled_from(list(STATES[True])), max_size=2),
)
def test_state_of_any_tensors_is_read_or_refused(nested: bool, changes: dict[str, Any], missing: set[str]) -> None:
    read_or_refuse({key: value for key, value in {**STATES[nested], **changes}.items() if key not in missing})


# -- configs that transformers builds ------------------------------------------------------------------------

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


@settings(max_examples=25)
@given(changes=st.dictionaries(st.sampled_from([*LLAMA, "num_labels", "rope_theta", "head_dim"]), scalars, max_size=2))
def test_config_with_any_value_is_built_or_refused(transformers: Any, folder: Path, changes: dict[str, Any]) -> None:
    with contextlib.suppress(HalfbyteError, OSError):
        make_plan(model_of(folder, config={**LLAMA, **changes}), Options("nf4"), [], [])


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"num_hidden_layers": 5000}, {"num_labels": 10**9}])
def test_config_of_countless_layers_is_refused(transformers: Any, folder: Path, change: dict[str, Any]) -> None:
    with pytest.raises(HalfbyteError, match=r"must be at most 100000; got 1000000000|describes more than the 1060 mod"):
        estimate(model_of(folder, config={**LLAMA, **change}))


def test_readers_agree_on_what_is_whole(folder: Path) -> None:
    """The other tests would pass for a reader that refuses everything."""
    model = model_of(folder)
    assert converted(folder, model, Options("nf4"))
    assert read_header(model / "model.safetensors").keys() == TENSORS.keys()
    assert all(read_or_refuse(STATES[nested]) is not None for nested in STATES)
