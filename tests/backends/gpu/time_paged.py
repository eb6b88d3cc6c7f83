"""Times a step of PagedAdamW8bit against what the link to the host allows, and with room on the device, on one GPU.

    python tests/backends/gpu/time_paged.py

The link's figure is that of copying the bytes of all states in and out at once, in two streams, from and to pinned
memory, in copies of 256 MiB.  Exits with 1 where a step reaches less than 85 % of it, and where one whose states all
stay on the device takes more than 1.05 times an unpaged one.
"""

import statistics
import sys
import time

import torch

from halfbyte import optim
from halfbyte.optim import paging
from halfbyte.optim.state import PARTS

PARAMETERS = 2**30
CHUNK = 2**28
MUST, MOST = 0.85, 1.05


def models():
    """Lists of parameters by name: one tensor, and the tensors of a small Llama's layers."""

    def tensor(n):
        param = torch.nn.Parameter(torch.randn(n, device="cuda", dtype=torch.bfloat16) * 0.02)
        param.grad = torch.randn_like(param) * 0.01
        return param

    yield "one tensor of 2^30", lambda: [tensor(PARAMETERS)]
    layer = [2048 * 2048] * 2 + [2048 * 512] * 2 + [8192 * 2048] * 3 + [2048] * 2
    yield "Llama-1B's tensors", lambda: [tensor(n) for n in [128_256 * 2048] + layer * 16]


def milliseconds(work, repeats=5):
    times = []
    for _ in range(repeats + 1):  # the first is not counted
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def link(size):
    """Milliseconds for `size` bytes in and as many out at the same time."""
    host = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(CHUNK, dtype=torch.uint8, device="cuda") for _ in range(2)]
    ways = [(torch.cuda.Stream(), device[0], host[0]), (torch.cuda.Stream(), host[1], device[1])]

    def both():
        for first in range(0, size, CHUNK):
            n = min(CHUNK, size - first)
            for stream, target, source in ways:
                with torch.cuda.stream(stream):
                    target[:n].copy_(source[:n], non_blocking=True)

    return milliseconds(both)


def main():
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    good = True
    for name, make in models():
        params = make()
        plain = optim.AdamW8bit(params, lr=1e-4)
        resident = milliseconds(plain.step)
        del plain
        roomy = optim.PagedAdamW8bit(params, lr=1e-4, paged_budget=2**35)
        staying = milliseconds(roomy.step)
        del roomy
        optimizer = optim.PagedAdamW8bit(params, lr=1e-4, paged_budget=paging.PASSING)
        step = milliseconds(optimizer.step)
        paged = [state for state in optimizer.state.values() if not state["state1"].is_cuda]
        size = sum(state[part].nbytes for state in paged for part in PARTS)
        del optimizer, paged
        allowed = link(size)
        share = allowed / step
        good &= share >= MUST and staying <= MOST * resident
        print(
            f"{name}: states of {size / 1e9:.2f} GB; step {step:.1f} ms, link {allowed:.1f} ms "
            f"({size / allowed / 1e6:.1f} GB/s each way), unpaged {resident:.2f} ms, staying "
            f"{staying:.2f} ms; {share:.1%} of the link, must be {MUST:.0%}; {staying / resident:.3f} of unpaged, "
            f"may be {MOST}"
        )
        del params
        torch.cuda.empty_cache()
    print("good" if good else "TOO SLOW")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
