"""The `oracle` fixture: the real bitsandbytes, in a process of its own."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest


class Oracle:
    """`oracle.quantize_4bit(x, "nf4", 64)`: the answer of bitsandbytes."""

    def __init__(self):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "BNB_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bnb_oracle.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**clean, "CUDA_VISIBLE_DEVICES": ""},
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


@pytest.fixture(scope="session")
def oracle(real_bitsandbytes):
    oracle = Oracle()
    yield oracle
    oracle.process.stdin.close()
    oracle.process.stdout.close()
    oracle.process.wait(timeout=30)
