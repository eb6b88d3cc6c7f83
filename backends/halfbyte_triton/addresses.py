"""What the update kernel walks: the addresses of all tensors of a call, and how programs share them.

Made on the host and kept on the device while the addresses stay the same.
"""

from __future__ import annotations

from typing import Any

import torch

from .launch import cdiv
from .update import FIELDS


class Table:
    """What update_kernel walks, on the device.

    rows    FIELDS numbers per tensor
    parts   (row, part of it) per program
    bounds  first program of each tensor, and the number of programs
    host    where it was copied from; a captured copy reads it again
    stream  that it was copied on, and when: `copied`
    """

    def __init__(self, fields: tuple[int, ...], span: int, device: torch.device) -> None:
        sizes = fields[7::FIELDS]
        counts = torch.tensor([cdiv(size, span) for size in sizes])
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        part = torch.arange(len(tensor)) - bounds[tensor]
        host = torch.cat((torch.tensor(fields), torch.stack((tensor, part), 1).reshape(-1), bounds))
        on_cuda = device.type == "cuda"
        self.host = host.pin_memory() if on_cuda else host
        there = self.host.to(device, non_blocking=on_cuda)
        self.stream = torch.cuda.current_stream(device) if on_cuda else None
        self.copied = self.stream.record_event() if self.stream else None
        self.rows, self.parts, self.bounds = there.split((len(fields), 2 * len(tensor), len(bounds)))


_tables: dict[tuple[Any, ...], Table] = {}  # the last ones made
_captured: list[Table] = []  # those that a CUDA graph reads whenever it is replayed
MOST_TABLES = 256


def table_of(fields: tuple[int, ...], span: int, device: torch.device) -> Table:
    """The table of these tensors, kept while their addresses stay the same.

    span   elements of one program
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = fields, span, device
    table = _tables.get(key)
    if table is None:
        table = Table(*key)
        if not capturing:  # a captured copy has not happened yet
            if len(_tables) >= MOST_TABLES:
                _tables.pop(next(iter(_tables)), None)
            _tables[key] = table
    elif device.type == "cuda" and not capturing and (stream := torch.cuda.current_stream(device)) != table.stream:
        stream.wait_event(table.copied)  # type: ignore[arg-type]
        table.rows.record_stream(stream)
    if capturing:
        _captured.append(table)
    return table
