"""Quantizing a safetensors folder into one that transformers and bitsandbytes load.

Layer by layer, so that memory is bounded by the largest layer; shard by shard into a partial folder beside the
destination, which gets its name only when everything is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .checkpoint import CONFIG, INDEX, Checkpoint
from .entries import ConvertedLayer
from .jobs import divided_threads
from .model_files import copy_companions, require_space, storing, sync_entry, sync_folder, write_json
from .options import COMPUTE_DTYPES, Options
from .partial import Partial, partial_folder
from .plan import Plan, apart, make_plan
from .shard import Shard, Steps, convert_shard

__all__ = ["COMPUTE_DTYPES", "ConvertReport", "ConvertedLayer", "Options", "Progress", "convert"]

MAX_JOBS = 256

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ConvertReport:
    """What became of a model.

    path          of the new folder
    layers        that were quantized
    tensors       number of tensors in the source
    bytes_before  of all tensors of the source
    bytes_after   of all tensors written
    copied        files that were copied as they are
    left_out      files that were not
    warnings      sentences
    resumed       a sentence about what an earlier run had left; "" where there was nothing
    """

    path: Path
    format: str
    layers: tuple[ConvertedLayer, ...]
    tensors: int
    bytes_before: int
    bytes_after: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    resumed: str = ""


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: Options,
    *,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    jobs: int = 1,
    progress: Progress | None = None,
) -> ConvertReport:
    """Quantize the linear layers of a Hugging Face safetensors folder into a new folder.

    skip       names or regular expressions, matched in full against a layer's path or its last part: left out
    include    the same: only these, also such as transformers would leave out
    jobs       layers at a time, each in a thread with its part of torch's threads
    progress   called with (layers done, layers in all, tensor name), from one thread at a time

    Memory: a few copies of the largest tensor for each job, and a constant.  Two runs write the same bytes, however
    many jobs they have and however often they were killed: a rerun uses the finished shards of one that was killed or
    interrupted.  After an error nothing is left behind.
    Raises InputError, FormatError, StorageError.
    """
    if not 1 <= jobs <= MAX_JOBS:
        raise InputError(f"jobs must be from 1 to {MAX_JOBS}; got {jobs}")
    origin, target = apart(Path(source), Path(destination))
    plan = make_plan(origin, options, skip, include)
    written = plan.written()
    needed = sum(nbytes for _, nbytes in written.values())
    identity = _identity(plan)
    with storing(target, origin, needed), partial_folder(target, identity) as partial:
        shards = _write_shards(plan, partial, target, jobs, progress)
        nbytes = sum(shard.nbytes for shard in shards)
        write_json(
            partial.files / CONFIG, {**plan.checkpoint.config, "quantization_config": plan.quantization_config()}
        )
        if plan.checkpoint.index is not None:
            weight_map = {name: written[name][0] for name in sorted(written)}
            metadata = {**plan.checkpoint.index, "total_size": nbytes}
            write_json(partial.files / INDEX, {"metadata": metadata, "weight_map": weight_map})
        copied, left_out = copy_companions(origin, partial.files, written={*plan.checkpoint.shards, CONFIG, INDEX})
        sync_folder(partial.files)
        if _source(plan.checkpoint) != identity["source files"]:
            raise InputError(f"{origin} changed during the conversion, so its result cannot be trusted")
        if os.path.lexists(target):
            raise InputError(f"{target} appeared during the conversion and is not replaced")
        partial.files.rename(target)
        sync_entry(target.parent)
        note = partial.note
    stored = plan.checkpoint.tensors()
    return ConvertReport(
        path=target,
        format=options.format,
        layers=tuple(layer for shard in shards for layer in shard.layers),
        tensors=len(stored),
        bytes_before=sum(one.nbytes for one in stored.values()),
        bytes_after=nbytes,
        copied=copied,
        left_out=left_out,
        warnings=tuple(f"--skip {pattern!r} matches no layer" for pattern in plan.selection.unused),
        resumed=note,
    )


def _write_shards(plan: Plan, partial: Partial, target: Path, jobs: int, progress: Progress | None) -> list[Shard]:
    """All shards, those of an earlier run among them, in the order of the source."""
    missing = [file for file in plan.checkpoint.shards if file not in partial.finished]
    sizes = dict.fromkeys(plan.checkpoint.shards, 0)
    for file, nbytes in plan.written().values():
        sizes[file] += nbytes
    # The largest shard is on disk twice for a moment: its layers in the spool, then the file.
    require_space(target, sum(sizes[file] for file in missing) + max((sizes[file] for file in missing), default=0))
    steps = Steps(progress, len(plan.selection.layers))
    steps.skip(sum(len(shard.layers) for shard in partial.finished.values()))
    with divided_threads(jobs):
        for file in missing:
            new = partial.spool / file
            partial.finish(convert_shard(plan, file, partial.spool / "layers", new, jobs, steps), new)
    return [partial.finished[file] for file in plan.checkpoint.shards]


def _identity(plan: Plan) -> dict[str, Any]:
    """All that the bytes of a shard depend on, as JSON gives it back; the keys are for people."""
    from .. import __version__

    choice = {name: asdict(layer) for name, layer in plan.selection.layers.items()}
    identity = {
        "versions": f"halfbyte {__version__}, torch {torch.__version__}",
        "options": asdict(plan.options),
        "source files": _source(plan.checkpoint),
        "chosen layers": hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest(),
    }
    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found


def _source(checkpoint: Checkpoint) -> dict[str, list[int | str]]:
    """Size, time of the last change and a hash of the header for every file with weights; for the JSON files too."""
    names = [CONFIG, *(() if checkpoint.index is None else (INDEX,)), *checkpoint.shards]
    found: dict[str, list[int | str]] = {}
    for name in names:
        path = checkpoint.folder / name
        status = path.stat()
        with path.open("rb") as file:
            head = file.read(8)
            # The JSON files have no such length in front, and are hashed as a whole.
            length = int.from_bytes(head, "little") if name in checkpoint.shards else status.st_size
            digest = hashlib.sha256(head + file.read(min(length, status.st_size))).hexdigest()
        found[name] = [status.st_size, status.st_mtime_ns, digest]
    return found
