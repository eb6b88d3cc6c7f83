"""DDP and FSDP2 on two gloo processes; the checks themselves are in ranks.py."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANKS = Path(__file__).with_name("ranks.py")
CHECKS = [
    node.name
    for node in ast.parse(RANKS.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and any(ast.unparse(one) == "check" for one in node.decorator_list)
]

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch lacks gloo"
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What both ranks found, from one pair of processes for all checks."""
    folder = tmp_path_factory.mktemp("ranks")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(folder / "meet"), str(folder / f"{rank}.json")],
            env=variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(answers: list[dict[str, str | None]], name: str) -> None:
    for rank, found in enumerate(answers):
        assert found[name] is None, f"rank {rank}: {found[name]}"
