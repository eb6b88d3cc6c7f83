"""The `oracle` fixture: the real bitsandbytes, in a process of its own."""

import os
import pickle
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest


class Oracle:
    """`oracle.quantize_4bit(x, "nf4", 64)`: the answer of bitsandbytes.

    hidden  environment variables that keep it from the GPUs
    """

    def __init__(self, hidden):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "BNB_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bnb_oracle.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**clean, **hidden},
        )

    def __getattr__(self, name):
        if name.startswith("_"):  # hypothesis and pytest look for hooks of their own
            raise AttributeError(name)

        def ask(*args, **kwargs):
            pickle.dump((name, args, kwargs), self.process.stdin)
            self.process.stdin.flush()
            good, answer = pickle.load(self.process.stdout)
            if not good:
                raise RuntimeError(f"bitsandbytes raised in {name}:\n{answer}")
            return answer

        return ask

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def oracle(real_bitsandbytes):
    with closing(Oracle({"CUDA_VISIBLE_DEVICES": ""})) as oracle:
        yield oracle


@pytest.fixture(scope="session")
def gpu_oracle(real_bitsandbytes):
    """The oracle with the GPUs of this machine."""
    with closing(Oracle({})) as oracle:
        yield oracle
