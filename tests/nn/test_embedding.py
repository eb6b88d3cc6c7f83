"""Quantized embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte.nn import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, Params4bit


def table4(rows: int, dim: int, cls: type[Embedding4bit], *, nested: bool = False, dtype: torch.dtype) -> Embedding4bit:
    torch.manual_seed(rows)
    made = cls(rows, dim, dtype)
    made.weight = Params4bit(
        torch.randn(rows, dim, dtype=dtype),
        compress_statistics=nested,
        quant_type=made.weight.quant_type,
        module=made,
    )
    return made.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [EmbeddingNF4, EmbeddingFP4])
@pytest.mark.parametrize("dim", [128, 64, 96, 33])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
def test_lookup_equals_the_row_of_the_dequantized_table(
    cls: type[Embedding4bit], dim: int, nested: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    made = table4(50, dim, cls, nested=nested, dtype=dtype)
    ids = torch.randint(0, 50, shape)
    whole = halfbyte.functional.dequantize_4bit(made.weight, made.required_state())
    assert torch.equal(made(ids), F.embedding(ids, whole))
    assert made(ids).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_lookup_equals_the_row_of_the_dequantized_table(dtype: torch.dtype) -> None:
    made = Embedding8bit(50, 40, dtype=dtype).to("cpu")
    ids = torch.randint(0, 50, (2, 3))
    whole = halfbyte.functional.dequantize_int8(made.weight.data, made.weight.SCB, dtype=dtype)
    assert torch.equal(made(ids), F.embedding(ids, whole))


@pytest.mark.parametrize(
    "build", [lambda: EmbeddingNF4(50, 64), lambda: EmbeddingFP4(50, 33), lambda: Embedding8bit(50, 64)]
)
def test_saves_and_loads(tmp_path: object, build: object) -> None:  # bitsandbytes cannot
    made = build().to("cpu")
    save_file(made.state_dict(), tmp_path / "table.safetensors")
    fresh = build()
    fresh.load_state_dict(load_file(tmp_path / "table.safetensors"))
    ids = torch.arange(50)
    assert torch.equal(fresh(ids), made(ids))


def test_lookup_before_quantizing_says_what_to_do() -> None:
    with pytest.raises(halfbyte.InputError, match="not quantized yet"):
        EmbeddingNF4(50, 64)(torch.tensor([1]))
    with pytest.raises(halfbyte.InputError, match="not quantized yet"):
        Embedding8bit(50, 64)(torch.tensor([1]))
