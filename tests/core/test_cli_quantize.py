"""`halfbyte quantize` on folders made by hand, without transformers: layout, refusals, and what is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte import functional
from halfbyte.__main__ import main
from halfbyte.conversion.checkpoint import read_checkpoint
from halfbyte.conversion.convert import Options, convert

CONFIG = {"model_type": "acme", "architectures": ["AcmeModel"], "hidden_size": 64}
LAYERS = r".*\.(up|down)"


@pytest.fixture(autouse=True)
def _without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards, bfloat16."""
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    shards = {
        "model-00001-of-00002.safetensors": {"embed.weight": random(10, 64), "layers.0.up.weight": random(96, 64)},
        "model-00002-of-00002.safetensors": {
            "layers.0.down.weight": random(64, 96),
            "layers.0.down.bias": random(64),
            "norm.weight": random(64),
        },
    }
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    write(folder / "config.json", CONFIG)
    write(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": 1, "note": "x"}, "weight_map": weight_map}
    )
    return folder


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder, with its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; it must exit with 2, say one sentence and leave the disk as it was.  Gives the sentence."""

    def run(*arguments: object) -> str:
        before = snapshot(tmp_path)
        assert main(["quantize", *map(str, arguments)]) == 2
        assert snapshot(tmp_path) == before
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err.startswith("halfbyte: ")
        assert streams.err.count("\n") == 1
        return streams.err

    return run


def options(format: str = "nf4", **more: Any) -> Options:
    return Options(format, **more)


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_quantize_4bit_writes_packed_weight_and_state(model: Path, tmp_path: Path, format: str, nested: bool) -> None:
    source = load_file(model / "model-00001-of-00002.safetensors")
    convert(model, tmp_path / "out", options(format, nested=nested), include=[LAYERS])
    found = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")

    name = "layers.0.up.weight"
    packed, state = functional.quantize_4bit(source[name], format=format, nested=nested)
    expected = {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
    assert found.keys() == {"embed.weight", *expected}
    assert found[name].shape == (96 * 64 // 2, 1)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(found["embed.weight"], source["embed.weight"])
    stats = {key: value for key, value in found.items() if key.startswith(f"{name}.")}
    assert halfbyte.QuantState.from_dict(stats).dtype == torch.bfloat16


def test_quantize_int8_writes_codes_scales_and_format(model: Path, tmp_path: Path) -> None:
    source = load_file(model / "model-00001-of-00002.safetensors")["layers.0.up.weight"]
    convert(model, tmp_path / "out", options("int8"), include=["up"])
    found = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")

    codes, absmax, _ = functional.quantize_int8_rows(source.half())
    assert torch.equal(found["layers.0.up.weight"], codes)
    assert torch.equal(found["layers.0.up.SCB"], absmax)
    assert found["layers.0.up.weight_format"].shape == ()
    assert found["layers.0.up.weight_format"] == 0


def test_quantize_int8_takes_the_original_where_float16_overflows(tmp_path: Path) -> None:
    weight = torch.full((2, 64), 1e5, dtype=torch.bfloat16)
    single(tmp_path / "m", {"a.weight": weight})
    convert(tmp_path / "m", tmp_path / "out", options("int8"), include=["a"])
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a.SCB"], weight[:, 0].float())


def single(folder: Path, tensors: dict[str, torch.Tensor], config: object = CONFIG) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    write(folder / "config.json", config)
    return folder


def test_quantize_keeps_shards_and_rewrites_the_index(model: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out", options(), include=[LAYERS])
    index = read(tmp_path / "out" / "model.safetensors.index.json")
    files = {
        name: file for file in sorted(set(index["weight_map"].values())) for name in load_file(tmp_path / "out" / file)
    }
    assert index["weight_map"].keys() == files.keys()
    assert sorted(set(index["weight_map"].values())) == sorted(read_checkpoint(model).shards)
    total = sum(
        tensor.nbytes
        for file in set(index["weight_map"].values())
        for tensor in load_file(tmp_path / "out" / file).values()
    )
    assert index["metadata"] == {"total_size": total, "note": "x"}
    assert report.bytes_after == total
    read_checkpoint(tmp_path / "out")  # index, headers and files agree


def test_quantize_single_file_stays_single(tmp_path: Path) -> None:
    source = single(tmp_path / "m", {"a.weight": torch.ones(4, 64), "b": torch.ones(3)})
    convert(source, tmp_path / "out", options(), include=["a"])
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_quantize_writes_config(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", options("nf4", nested=True, compute_dtype="float16"), include=["up"])
    config = read(tmp_path / "out" / "config.json")
    quantization = config.pop("quantization_config")
    assert config == CONFIG
    assert quantization["quant_method"] == "bitsandbytes"
    assert quantization["load_in_4bit"] is True
    assert quantization["bnb_4bit_use_double_quant"] is True
    assert quantization["bnb_4bit_compute_dtype"] == "float16"
    assert quantization["llm_int8_skip_modules"] == ["embed", "layers.0.down"]


def test_quantize_keeps_any_text_of_the_config(model: Path, tmp_path: Path) -> None:
    odd = {**CONFIG, "note": "\ud800 \u00e9 \u2603"}  # a lone surrogate is valid JSON, but no valid UTF-8
    write(model / "config.json", odd)
    convert(model, tmp_path / "out", options(), include=["up"])
    assert read(tmp_path / "out" / "config.json").items() >= odd.items()


def test_quantize_twice_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        convert(model, tmp_path / out, options(nested=True), include=[LAYERS])
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_quantize_copies_settings_and_tokenizers_only(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "1_Pooling").mkdir()
    (model / ".cache").mkdir()
    travel = [
        *(
            "tokenizer.json",
            "vocab.txt",
            "merges.txt",
            "tokenizer.model",
            "chat_template.jinja",
            "1_Pooling/config.json",
        ),
        *("qwen.tiktoken", "special_tokens_map.json", "generation_config.json"),
    ]
    stay = [
        *(
            "pytorch_model.bin",
            "training_args.bin",
            "x.pt",
            "x.pkl",
            "modeling_acme.py",
            "README.md",
            "extra.safetensors",
        ),
        *("pytorch_model.bin.index.json", "1_Pooling/x.pkl", "1_Pooling/run.py"),
    ]
    for name in [*travel, *stay, ".cache/x.json"]:
        (model / name).write_text(name)
    (model / "linked.json").symlink_to(tmp_path / "nowhere.json")

    assert main(["quantize", str(model), str(tmp_path / "out"), "--format", "nf4", "--include", LAYERS]) == 0
    found = {name for name, content in snapshot(tmp_path / "out").items() if content != "folder"}
    assert found == {*travel, "config.json", "model.safetensors.index.json", *read_checkpoint(model).shards}
    assert all((tmp_path / "out" / name).read_text() == name for name in travel)
    left_out = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("left out"))
    assert {*stay, ".cache", "linked.json"} == set(left_out.removeprefix("left out").strip().split(", "))


def test_quantize_files_get_ordinary_permissions(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", options(), include=["up"])
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_quantize_follows_links_to_shards_as_the_hub_cache_has_them(model: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for path in list(model.iterdir()):
        blob = tmp_path / "blobs" / hashlib.sha256(path.name.encode()).hexdigest()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, model))
    convert(model, tmp_path / "out", options(), include=["up"])
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_quantize_reports_each_kind_and_layer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["quantize", str(model), str(tmp_path / "out"), "--format", "nf4", "--include", LAYERS, "--verbose"]) == 0
    )
    out = capsys.readouterr().out
    for text in ("layers.0.up", "96 x 64", "down", "all quantized", "relative error", str(tmp_path / "out")):
        assert text in out


def test_quantize_report_has_the_error_of_each_layer(model: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out", options(), include=[LAYERS])
    assert [layer.module for layer in report.layers] == ["layers.0.up", "layers.0.down"]
    assert all(0.05 < layer.error < 0.15 for layer in report.layers)
    assert report.layers[0].bytes_before == 96 * 64 * 2


def test_quantize_progress_counts_to_the_end(model: Path, tmp_path: Path) -> None:
    seen = []
    convert(model, tmp_path / "out", options(), include=[LAYERS], progress=lambda *step: seen.append(step))
    assert seen[0][:2] == (0, 2)
    assert seen[-1] == (2, 2, "layers.0.down.weight")


@pytest.mark.parametrize("skip", ["down", "layers.0.down", r"layers\.\d+\.down", "embed|down"])
def test_skip_matches_path_last_part_and_expression(model: Path, tmp_path: Path, skip: str) -> None:
    report = convert(model, tmp_path / "out", options(), include=[LAYERS], skip=[skip])
    assert [layer.module for layer in report.layers] == ["layers.0.up"]
    assert report.warnings == ()


def test_skip_that_matches_nothing_is_a_warning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(model), str(tmp_path / "out"), "--format", "nf4", "--include", LAYERS, "--skip", "dow"]
    assert main(arguments) == 0
    assert "warning: --skip 'dow' matches no layer" in capsys.readouterr().err


# -- refusals ------------------------------------------------------------------------------------------------

INCLUDE = ("--include", LAYERS)


def test_refuses_a_model_that_is_no_folder(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "must be a folder" in refusal(tmp_path / "missing", tmp_path / "out", "--format", "nf4")
    assert "must be a folder" in refusal(model / "config.json", tmp_path / "out", "--format", "nf4")


def test_refuses_a_folder_without_config(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (model / "config.json").unlink()
    assert "has no config.json" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


@pytest.mark.parametrize("content", ["[1]", "null", "{", '{"a": 1} x', "\x00", "[" * 100_000, "\ud800"])
def test_refuses_a_config_that_is_no_object(
    model: Path, tmp_path: Path, refusal: Callable[..., str], content: str
) -> None:
    (model / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    assert "config.json" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


def test_refuses_a_folder_without_weights(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path / "m" / "config.json", CONFIG)
    assert "has no safetensors weights" in refusal(tmp_path / "m", tmp_path / "out", "--format", "nf4")


def test_refuses_pickles(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path / "m" / "config.json", CONFIG)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80")
    assert "convert to safetensors first" in refusal(tmp_path / "m", tmp_path / "out", "--format", "nf4")


def test_refuses_shards_without_an_index(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (model / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


def test_refuses_an_output_that_exists(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("out", "file", "dangling"):
        assert "is there already" in refusal(model, tmp_path / name, "--format", "nf4", *INCLUDE)


def test_refuses_an_output_inside_the_model(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "link").symlink_to(model)
    (model / "sub").mkdir()
    for source, out in (
        (model, model / "out"),
        (model, model / "sub" / "out"),
        (tmp_path / "link", model / "out"),
        (model, tmp_path / "link" / "out"),
        (model, tmp_path / "x" / ".." / "model" / "out"),
    ):
        assert "inside the model's own folder" in refusal(source, out, "--format", "nf4", *INCLUDE)
    assert "is there already" in refusal(model, model, "--format", "nf4", *INCLUDE)


def test_refuses_an_output_below_a_missing_folder(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "does not exist" in refusal(model, tmp_path / "a" / "b", "--format", "nf4", *INCLUDE)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        "x.bin",
        3,
        None,
        "c:x.safetensors",
    ],
)
def test_refuses_a_weight_map_that_leads_elsewhere(
    model: Path, tmp_path: Path, refusal: Callable[..., str], file: object
) -> None:
    single(tmp_path / "a", {"embed.weight": torch.ones(2, 2)})
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "a" / "model.safetensors").read_bytes())
    index = read(model / "model.safetensors.index.json")
    index["weight_map"]["embed.weight"] = file
    write(model / "model.safetensors.index.json", index)
    assert "must map embed.weight to a" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_refuses_an_index_without_a_weight_map(
    model: Path, tmp_path: Path, refusal: Callable[..., str], weight_map: object
) -> None:
    write(model / "model.safetensors.index.json", {"weight_map": weight_map})
    assert "weight_map" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


def test_refuses_a_missing_shard(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


def test_refuses_an_index_and_files_that_disagree(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    index = read(model / "model.safetensors.index.json")
    removed = index["weight_map"].pop("norm.weight")
    write(model / "model.safetensors.index.json", index)
    assert "does not map" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)
    index["weight_map"] |= {"norm.weight": removed, "more.weight": removed}
    write(model / "model.safetensors.index.json", index)
    assert "more.weight" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_refuses_a_truncated_shard_before_writing(
    model: Path, tmp_path: Path, refusal: Callable[..., str], keep: int
) -> None:
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert path.name in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


@pytest.mark.parametrize(
    "config", [{"quantization_config": {"quant_method": "gptq"}}, {"text_config": {"quantization_config": {}}}]
)
def test_refuses_a_quantized_config(
    model: Path, tmp_path: Path, refusal: Callable[..., str], config: dict[str, Any]
) -> None:
    write(model / "config.json", {**CONFIG, **config})
    assert "is quantized already" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_refuses_its_own_output(model: Path, tmp_path: Path, refusal: Callable[..., str], format: str) -> None:
    convert(model, tmp_path / "one", options(format), include=[LAYERS])
    assert "is quantized already" in refusal(tmp_path / "one", tmp_path / "out", "--format", "nf4", *INCLUDE)
    write(tmp_path / "one" / "config.json", CONFIG)
    assert "is quantized already" in refusal(tmp_path / "one", tmp_path / "out", "--format", "nf4", *INCLUDE)


def test_refuses_an_unknown_model_without_include(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "pip install halfbyte[transformers]" in refusal(model, tmp_path / "out", "--format", "nf4")


def test_skip_and_include_take_one_value_and_leave_the_folders_alone(model: Path, tmp_path: Path) -> None:
    arguments = ["--include", "up", "--include", "down", "--skip", "xyz", "--skip", "down", str(model)]
    assert main(["quantize", "--format", "nf4", *arguments, str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "down" in str(config["quantization_config"])


def test_refuses_when_nothing_is_left(model: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "--include matches no" in refusal(model, tmp_path / "out", "--format", "nf4", "--include", "xyz")
    assert "--skip matches all" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE, "--skip", ".*")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--format", "nf5"), "format must be one of nf4, fp4, int8; got 'nf5'"),
        (("--format", "nf4", "--blocksize", "100"), "blocksize must be one of 32, 64, 128"),
        (("--format", "int8", "--nested"), "nested needs a 4-bit format"),
        (("--format", "int8", "--threshold", "-1"), "threshold must be 0"),
        (("--format", "int8", "--threshold", "nan"), "threshold must be 0"),
        (("--format", "nf4", "--compute-dtype", "float64"), "compute dtype must be one of"),
        (("--format", "nf4", "--device", "nonsense"), "device 'nonsense' cannot be used"),
        (("--format", "nf4", "--device", "meta"), "device 'meta' cannot be used"),
        (("--format", "nf4", "--skip", "("), "--skip must be a regular expression or a name; got '('"),
        (("--format", "nf4", "--include", "*"), "--include must be a regular expression or a name; got '*'"),
    ],
)
def test_refuses_a_wrong_option(
    model: Path, tmp_path: Path, refusal: Callable[..., str], arguments: tuple[str, ...], sentence: str
) -> None:
    more = () if "--include" in arguments else INCLUDE
    assert sentence in refusal(model, tmp_path / "out", *arguments, *more)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_refuses_weights_of_other_dtypes(tmp_path: Path, refusal: Callable[..., str], dtype: torch.dtype) -> None:
    single(tmp_path / "m", {"a.weight": torch.ones(4, 64).to(dtype), "b.weight": torch.ones(4, 64)})
    assert "a.weight must be one of float32" in refusal(
        tmp_path / "m", tmp_path / "out", "--format", "nf4", "--include", ".*"
    )
    convert(tmp_path / "m", tmp_path / "out", options(), include=["b"])  # as it is, it may stay


def test_refuses_transposed_weights_without_the_architecture(tmp_path: Path, refusal: Callable[..., str]) -> None:
    single(tmp_path / "m", {"a.weight": torch.ones(64, 192), "a.bias": torch.ones(192)})
    assert "stored transposed" in refusal(tmp_path / "m", tmp_path / "out", "--format", "nf4", "--include", "a")


# -- interruptions -------------------------------------------------------------------------------------------


def test_an_error_on_the_way_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    import halfbyte.conversion.convert

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(halfbyte.conversion.convert, "copy_companions", fail)  # after the shards are written
    assert "cannot be written: no space left" in refusal(model, tmp_path / "out", "--format", "nf4", *INCLUDE)


def test_an_output_that_appears_meanwhile_is_kept(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(halfbyte.InputError, match="appeared"):
        convert(model, out, options(), include=["up"], progress=lambda *_: out.mkdir(exist_ok=True))
    assert os.listdir(out) == []
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
