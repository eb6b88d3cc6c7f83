"""The same call gives the same bits: again, after other calls, bound to a weight, and from several threads at once."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from halfbyte.testing import cases, compare


def test_kernel_gives_the_same_bits_again(typical: cases.Case) -> None:
    for size in typical.sizes("usual", "partial"):
        first = cases.results(typical.op, typical.kernel.function, typical.args(size))
        kept = [one.clone() for one in first]
        for other in typical.sizes("odd", "one"):
            cases.results(typical.op, typical.kernel.function, typical.args(other))
        assert compare.same_bits(kept, first), f"{typical.title}, size {size}: a later call changed an earlier result"
        again = cases.results(typical.op, typical.kernel.function, typical.args(size))

        assert compare.same_bits(kept, again), f"{typical.title}, size {size}: two calls gave different bits"


def test_kernel_gives_the_same_bits_bound_to_a_weight(typical: cases.Case) -> None:
    """Of a kernel that cannot be bound there is nothing to compare."""
    bind = typical.kernel.bind
    for size in typical.sizes("usual", "partial", "odd", "one") if bind else ():
        args = typical.args(size)
        x, bias, tensors, plain = cases.over_weight(typical.op, args)
        way = bind(*tensors, *plain)  # type: ignore[misc]
        expected = cases.results(typical.op, typical.kernel.function, args)

        for _ in range(2):
            found = cases.results(typical.op, way, (x, bias, tensors))
            assert compare.same_bits(expected, found), f"{typical.title}, size {size}: bound, it gave other bits"


def test_kernel_runs_in_several_threads(typical: cases.Case) -> None:
    sizes = typical.sizes("usual", "partial", "odd")
    alone = {size: cases.results(typical.op, typical.kernel.function, typical.args(size)) for size in sizes}
    wrong: list[str] = []
    own_threads = torch.get_num_threads()

    def work(size: str) -> None:
        torch.set_num_threads(own_threads)  # a new thread begins with the process's default, and sums in another order
        try:
            for _ in range(4):
                args = typical.args(size)  # anew, as the op may write to them
                found: tuple[Tensor, ...] = cases.results(typical.op, typical.kernel.function, args)
                if not compare.same_bits(found, alone[size]):
                    wrong.append(f"size {size}: other bits than alone")
        except Exception as error:
            wrong.append(f"size {size}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong, f"{typical.title}, {len(threads)} threads: {wrong[0]}"
