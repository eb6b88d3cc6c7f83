"""fork after import and after use, spawn, and DataLoader workers: a child computes what its parent does.

Each case runs in a fresh interpreter: a fork of the test process itself would also test pytest and its threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")

COMMON = """
    import multiprocessing, os, signal, sys, threading, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads: the point here
    import torch
    import halfbyte
    from halfbyte.nn import Embedding4bit, Linear8bitLt, LinearNF4

    torch.set_num_threads(2)

    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            LinearNF4(512, 600, compress_statistics=True).to("cpu"),
            Linear8bitLt(600, 256, has_fp16_weights=False, threshold=4.0).to("cpu"),
        )

    def compute(model):
        # Small enough that torch itself starts no threads here: its own parallel loops hang in a forked child.
        x = torch.linspace(-3, 3, 40 * 512).reshape(40, 512).requires_grad_()
        y = model[0](x)
        y.sum().backward()
        packed, state = halfbyte.functional.quantize_4bit(x.detach(), nested=True)
        back = halfbyte.functional.dequantize_4bit(packed, state)
        return [y.detach(), x.grad, packed.float(), back, model[1](y.detach()).detach()]

    def child_threads():
        if os.environ["HALFBYTE_BACKEND"] == "reference":  # torch's own loops
            torch.set_num_threads(1)

    def same(one, other):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

    def in_child(work):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a child that hangs dies
            child_threads()
            try:
                work()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"the child ended with {status}"
"""


@pytest.fixture(params=["cpu,reference", "reference"])
def script(request: pytest.FixtureRequest, python: Callable[..., Any]) -> Callable[[str], None]:
    """`script(code)`: run code after COMMON with each backend for CPU tensors."""

    def run(code: str) -> None:
        # With a GPU in sight torch's autograd keeps threads, and refuses to work in a forked child.
        python(COMMON + code, HALFBYTE_BACKEND=request.param, CUDA_VISIBLE_DEVICES="")

    if request.param.startswith("cpu") and python("import halfbyte; print(halfbyte.active()['cpu'])").stdout != "cpu\n":
        pytest.skip("the cpu backend is not available")
    return run


def test_fork_after_import_computes_in_the_child(script: Callable[[str], None]) -> None:
    script("""
    in_child(lambda: compute(build()))
    compute(build())
    """)


def test_fork_after_use_computes_the_same_in_the_child(script: Callable[[str], None]) -> None:
    script("""
    model = build()
    expected = compute(model)
    in_child(lambda: same(compute(model), expected))
    same(compute(model), expected)
    """)


def test_fork_of_a_forked_child(script: Callable[[str], None]) -> None:
    script("""
    model = build()
    expected = compute(model)
    in_child(lambda: (compute(model), in_child(lambda: same(compute(model), expected))))
    """)


def test_fork_while_another_thread_holds_the_locks(script: Callable[[str], None]) -> None:
    script("""
    from halfbyte import derived
    from halfbyte._runtime import dispatcher

    held, done = threading.Event(), threading.Event()

    def hold():
        with derived._lock, dispatcher._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def child():
        derived.derived(torch.ones(3), "key", lambda: 1)
        compute(build())

    try:
        in_child(child)
    finally:
        done.set()
        thread.join()
    """)


def test_multiprocessing_fork_computes_the_same(script: Callable[[str], None]) -> None:
    script("""
    model = build()
    expected = compute(model)
    halfbyte.freeze_(model)

    def arrays(index):  # not tensors: torch copies them into shared memory in a parallel loop of its own
        return [one.numpy() for one in compute(model)]

    with multiprocessing.get_context("fork").Pool(2, child_threads) as pool:
        for found in pool.map(arrays, range(2)):
            same([torch.from_numpy(one) for one in found], expected)
    """)


SPAWNED = """
import multiprocessing
import torch
import halfbyte
from halfbyte.nn import LinearNF4

def work(layer, x):
    return layer(x).detach()

if __name__ == "__main__":
    torch.manual_seed(0)
    live, x = LinearNF4(64, 32, compress_statistics=True).to("cpu"), torch.randn(3, 64)
    frozen = LinearNF4(64, 32, compress_statistics=True).to("cpu")
    frozen.load_state_dict(live.state_dict())
    halfbyte.freeze_(frozen)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for layer in (live, frozen):
            assert torch.equal(pool.apply(work, (layer, x)), layer(x)), layer
"""


def test_spawned_children_take_layers_and_compute_the_same(tmp_path: Any, python: Callable[..., Any]) -> None:
    file = tmp_path / "spawned.py"
    file.write_text(SPAWNED)
    python(f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')")


def test_native_kernels_use_one_thread_after_a_fork_beside_threads(python: Callable[..., Any]) -> None:
    python(
        COMMON
        + """
    from halfbyte import native

    def one():
        assert native.threads() == 1

    torch.set_num_threads(2)
    assert native.threads() == 2
    os.environ["HALFBYTE_BACKEND"] = ""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    in_child(lambda: (one(), in_child(one)))
    done.set()
    thread.join()
    assert native.threads() == 2

    def two():
        assert native.threads() == (2 if sys.platform == "linux" else 1)

    if len(os.listdir("/proc/self/task")) == 1:
        in_child(two)
    """
    )


def test_dataloader_workers_look_up_a_quantized_table(script: Callable[[str], None]) -> None:
    script("""
    torch.manual_seed(0)
    table = Embedding4bit(50, 64, quant_type="nf4").to("cpu")
    expected = table(torch.arange(50))

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, index):
            return table(torch.tensor(index))

    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=10, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(torch.cat(list(loader)), expected)
    """)
