"""4-bit checkpoints: what either side writes, the other reads to the same values."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte import QuantState, formats
from halfbyte import functional as F

CASES = [
    (format, nested, dtype, shape, blocksize)
    for format in formats.FORMATS
    for nested in (False, True)
    for dtype, shape, blocksize in (
        (torch.bfloat16, (64, 256), 64),
        (torch.float16, (33, 96), 32),
        (torch.float32, (5, 7), 64),
        (torch.float32, (1000,), 128),
    )
]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def save(path, packed, state):
    save_file({"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}, path)


def load(path):
    stored = load_file(path)
    packed = stored.pop("w")
    return packed, QuantState.from_dict(stored)


def flat(state):
    """As one row: where blocks cross rows, as in (3, 96) by 64, bitsandbytes' CPU kernel decodes wrong values."""
    state.shape = torch.Size((state.shape.numel(),))
    return state


@pytest.mark.parametrize(("format", "nested", "dtype", "shape", "blocksize"), CASES)
def test_our_files_load_in_bitsandbytes(oracle, tmp_path, format, nested, dtype, shape, blocksize):
    packed, state = F.quantize_4bit(randn(*shape).to(dtype), format=format, nested=nested, blocksize=blocksize)
    save(tmp_path / "ours.safetensors", packed, flat(state))

    theirs = oracle.load_4bit(str(tmp_path / "ours.safetensors"))

    assert theirs.dtype == dtype
    assert torch.equal(F.dequantize_4bit(packed, state), theirs)


@pytest.mark.parametrize(("format", "nested", "dtype", "shape", "blocksize"), CASES)
def test_their_files_load_here(backend, oracle, tmp_path, format, nested, dtype, shape, blocksize):
    path = tmp_path / "theirs.safetensors"
    x = randn(*shape).to(dtype).reshape(-1)
    theirs = oracle.save_4bit(str(path), x, format, blocksize, nested)

    packed, state = load(path)

    assert (state.quant_type, state.nested, state.dtype, state.blocksize) == (format, nested, dtype, blocksize)
    assert torch.equal(F.dequantize_4bit(packed, state), theirs)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_their_files_come_back_byte_for_byte(oracle, tmp_path, storage, nested):
    """Loaded and saved again, a file of theirs does not change."""
    first, second = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    oracle.save_4bit(str(first), randn(64, 256).bfloat16(), "nf4", 64, nested, storage)

    packed, state = load(first)
    save(second, packed, state)

    before, after = load_file(first), load_file(second)
    assert sorted(before) == sorted(after)
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert value.shape == after[key].shape
        assert torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)), key


@pytest.mark.parametrize("nested", [False, True])
def test_our_json_is_spelled_like_theirs(oracle, tmp_path, nested):
    path = tmp_path / "x.safetensors"
    x = randn(64, 256).bfloat16()
    oracle.save_4bit(str(path), x, "nf4", 64, nested)
    theirs, their_keys = oracle.json_4bit(str(path))
    packed, state = F.quantize_4bit(x, nested=nested)
    save(path, packed, state)
    ours, our_keys = oracle.json_4bit(str(path))

    assert our_keys == their_keys
    if nested:  # the offset is a mean, whose order of additions is theirs
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours.pop("nested_offset") == pytest.approx(theirs.pop("nested_offset"), rel=1e-6)
        assert list(ours.items()) == list(theirs.items())
    else:
        assert ours == theirs
