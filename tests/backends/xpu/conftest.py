"""Lets the tests of this folder import `opencl`, and the tests of the portable kernels that they run again."""

import sys
from pathlib import Path

HERE = Path(__file__).parent

sys.path[:0] = [str(HERE), str(HERE.parent / "gpu")]
