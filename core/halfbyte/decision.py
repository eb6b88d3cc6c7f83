"""Decision: which kernel was picked for one situation, and why.  The error, the log and doctor print the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .kernel import DeviceFacts, Kernel, show

Reasons = tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """Which kernel was picked for one situation, and why not the others.

    op         name of the op
    facts      what the choice was made on
    device     the facts' device, in detail
    backend    name of the backend picked; None where nothing can run
    variant    of its kernel
    chosen_by  "priority", "halfbyte_rank", or who set the chain
    tried      (backend, reasons against) for each backend that was asked before one was found
    excluded   (backend, reason) for those that were not asked
    kernel     the kernel picked
    """

    op: str
    facts: Any
    device: DeviceFacts
    backend: str | None
    variant: str
    chosen_by: str
    tried: tuple[tuple[str, Reasons], ...]
    excluded: tuple[tuple[str, str], ...]
    kernel: Kernel | None

    def __str__(self) -> str:
        if self.backend:
            variant = f" ({self.variant})" if self.variant else ""
            head = f"{self.backend}{variant} runs {self.op} for:"
        else:
            head = f"no backend can run {self.op} for:"
        arch = f" ({self.device.arch})" if self.device.arch else ""
        rows = [("device", f"{self.device}{arch}")]
        rows += [(name, show(value)) for name, value in self.facts._asdict().items() if name != "device"]
        width = max(len(name) for name, _ in rows)
        lines = [head, *(f"    {name:{width}}  {value}" for name, value in rows)]
        if self.backend:
            lines.append(f"  chosen by {self.chosen_by}")
        lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in self.tried]
        lines += [f"  {name}: {reason}" for name, reason in self.excluded]
        return "\n".join(lines)
