"""`halfbyte estimate`: what it says is what `halfbyte quantize` writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import halfbyte
from halfbyte.__main__ import main
from halfbyte.conversion.checkpoint import read_checkpoint
from halfbyte.conversion.convert import Options, convert
from halfbyte.conversion.estimate import adamw8bit, estimate

INCLUDE = ["up", "down", "odd"]
OPTIONS = [f"--include={name}" for name in INCLUDE]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Layers of even and odd sizes in three dtypes, beside tensors of other kinds."""
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(100, 64, generator=generator).bfloat16(),
        "layers.0.up.weight": torch.randn(256, 64, generator=generator).bfloat16(),
        "layers.0.down.weight": torch.randn(64, 256, generator=generator).half(),
        "layers.0.odd.weight": torch.randn(7, 33, generator=generator),
        "layers.0.norm.weight": torch.ones(64),
        "positions": torch.arange(10),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "acme"}))
    return folder


EXACT = {"int8": Options("int8"), "nf4": Options("nf4"), "fp4": Options("fp4")}
NESTED = {"nf4 nested": Options("nf4", nested=True), "fp4 nested": Options("fp4", nested=True)}


@pytest.mark.parametrize("name", EXACT)
def test_estimate_is_what_quantize_writes_to_the_byte(model: Path, tmp_path: Path, name: str) -> None:
    report = convert(model, tmp_path / "out", EXACT[name], include=INCLUDE)
    found = estimate(model, include=INCLUDE)
    assert found.weights[name] == report.bytes_after
    assert found.layers == len(report.layers) == 3
    assert found.stored == report.bytes_before
    assert report.bytes_after == sum(one.nbytes for one in read_checkpoint(tmp_path / "out").tensors().values())


@pytest.mark.parametrize("name", NESTED)
def test_estimate_of_nested_is_exact_but_for_the_digits_of_the_offsets(model: Path, tmp_path: Path, name: str) -> None:
    report = convert(model, tmp_path / "out", NESTED[name], include=INCLUDE)
    assert abs(estimate(model, include=INCLUDE).weights[name] - report.bytes_after) <= 4 * len(report.layers)


@pytest.mark.parametrize("blocksize", [32, 4096])
def test_estimate_follows_the_block_size(model: Path, tmp_path: Path, blocksize: int) -> None:
    report = convert(model, tmp_path / "out", Options("nf4", blocksize), include=INCLUDE)
    assert estimate(model, blocksize=blocksize, include=INCLUDE).weights["nf4"] == report.bytes_after


def test_estimate_of_transformers_own_choice(tmp_path: Path) -> None:
    """Llama by layer names; gpt2 stores its weights transposed, with odd sizes here."""
    transformers = pytest.importorskip("transformers", reason="the choice of layers is its own")
    for name, built in {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
            )
        ).bfloat16(),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_embd=36, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1)
        ),
    }.items():
        built().save_pretrained(tmp_path / name)
        found = estimate(tmp_path / name)
        for format in ("int8", "nf4"):
            report = convert(tmp_path / name, tmp_path / f"{name}-{format}", Options(format))
            assert found.weights[format] == report.bytes_after


def test_estimate_of_training_follows_its_formulas(model: Path) -> None:
    found = estimate(model, include=INCLUDE, rank=20)
    adapters = [(20 * 64, 20 * 256), (20 * 256, 20 * 64), (20 * 33, 20 * 7)]
    numels = [numel for pair in adapters for numel in pair]
    qlora = found.qlora["nf4"]
    assert qlora.parameters == sum(numels)
    assert qlora.weights == found.weights["nf4"] + 4 * sum(numels)
    assert (qlora.gradients, qlora.adamw) == (4 * sum(numels), 8 * sum(numels))
    assert qlora.adamw8bit == 2 * (2 * 5120 + 8 * 20) + 8 * (1280 * 2 + 660 + 140)
    assert qlora.total_adamw8bit == qlora.weights + qlora.gradients + qlora.adamw8bit
    trained = found.parameters - 10
    assert (found.full.parameters, found.full.weights) == (trained, found.stored)
    assert (found.full.gradients, found.full.adamw) == (found.stored - 80, 8 * trained)


@pytest.mark.parametrize(
    ("numel", "nbytes"), [(0, 0), (4095, 8 * 4095), (4096, 2 * 4096 + 8 * 16), (4097, 2 * 4097 + 8 * 17)]
)
def test_adamw8bit_has_two_codes_and_two_absmax_per_256(numel: int, nbytes: int) -> None:
    assert adamw8bit(numel) == nbytes


def test_estimate_of_floats_counts_every_floating_tensor(model: Path) -> None:
    found = estimate(model, include=INCLUDE)
    assert found.weights["fp32"] == 4 * (found.parameters - 10) + 80
    assert found.weights["bf16"] == 2 * (found.parameters - 10) + 80


def test_estimate_reads_no_tensors(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors' bytes are a hole in a file too large for this machine, and nothing opens it but for its header."""
    path = model / "model.safetensors"
    header = {"big.weight": {"dtype": "BF16", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 41]}}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    try:
        os.truncate(path, 8 + len(raw) + (1 << 41))
    except OSError as error:
        pytest.skip(f"no file of 2 TB with a hole here: {error}")
    found = estimate(model, include=["big"])
    assert found.parameters == 1 << 40
    assert found.weights["int8"] == (1 << 40) + 4 * (1 << 20) + 1


def test_estimate_command_prints_figures_and_what_they_leave_out(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(model), *OPTIONS, "--skip", "nothing"]) == 0
    streams = capsys.readouterr()
    for text in ("fp32", "nf4 nested", "QLoRA on nf4, rank 16", "AdamW8bit", "Activations", "not included"):
        assert text in streams.out
    assert "warning: --skip 'nothing' matches no layer" in streams.err


def test_estimate_command_prints_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(model), *OPTIONS, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["weights"].keys() == {"fp32", "bf16", "int8", "nf4", "fp4", "nf4 nested", "fp4 nested"}
    assert found["training"].keys() == {"full", "qlora nf4", "qlora nf4 nested"}
    one = found["training"]["full"]
    assert one["total_adamw"] == one["weights"] + one["gradients"] + one["adamw"]
    assert "Activations" in found["not_included"]


@pytest.mark.parametrize("rank", [0, -1, 65537])
def test_estimate_refuses_a_rank_out_of_range(model: Path, rank: int) -> None:
    with pytest.raises(halfbyte.InputError, match=f"rank must be from 1 to 65536; got {rank}"):
        estimate(model, include=INCLUDE, rank=rank)


def test_estimate_refuses_what_quantize_refuses(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(model, tmp_path / "out", Options("nf4"), include=INCLUDE)
    assert main(["estimate", str(tmp_path / "out"), *OPTIONS]) == 2
    assert main(["estimate", str(tmp_path / "missing")]) == 2
    assert main(["estimate", str(model), "--blocksize", "100"]) == 2
    told = capsys.readouterr().err
    assert "is quantized already" in told
    assert "must be a folder" in told
    assert "blocksize must be one of" in told
