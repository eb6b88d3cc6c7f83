"""Several threads over one list of work.

Threads, because what takes the time (torch's operators, the kernels, reading and writing) runs without the
interpreter's lock, and a process of its own would cost each job another import of torch.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


def each(items: Iterable[Item], worker: Callable[[], Callable[[Item], None]], jobs: int) -> None:
    """Do all the work; every item is done once, in any order.

    worker   makes what does it, once in each thread

    The first error stops the others after the item they are at, and is raised.
    """
    if jobs == 1:
        work = worker()
        for item in items:
            work(item)
        return
    shared = iter(items)
    lock, stop = threading.Lock(), threading.Event()

    def loop() -> None:
        try:
            work = worker()
            for item in _taken(shared, lock, stop):
                work(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(jobs, thread_name_prefix="halfbyte-quantize") as pool:
        # A copy of the context: use_backend of the caller holds in the threads too.
        running = [pool.submit(contextvars.copy_context().run, loop) for _ in range(jobs)]
        try:
            for one in running:
                one.result()
        finally:
            stop.set()


def _taken(shared: Iterator[Item], lock: threading.Lock, stop: threading.Event) -> Iterator[Item]:
    while not stop.is_set():
        with lock:
            item = next(shared, None)
        if item is None:
            return
        yield item


@contextmanager
def divided_threads(jobs: int) -> Iterator[None]:
    """torch's threads for each of the jobs: together as many as there were."""
    before = torch.get_num_threads()
    if jobs == 1:
        yield
        return
    torch.set_num_threads(max(before // jobs, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
