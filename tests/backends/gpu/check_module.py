"""`python check_module.py FOLDER ARCHS`: a compiled GPU module, imported where there is no GPU.

It must say what it was built for, that there is no device and why, refuse a launch in words, and need no driver.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(folder: str, archs: str) -> None:
    (file,) = Path(folder).glob("_C.*.so")
    needed = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed, f"needs a CUDA library that is not there without a driver:\n{needed}"
    sys.path.insert(0, folder)
    import _C

    assert _C.archs() == archs.replace(";", ","), _C.archs()
    count, why = _C.device_count()
    print(f"{file.name}: built for {_C.archs()}; {count} devices {why}")
    if count:
        return
    assert why
    assert not getattr(_C, "has_cublas", bool)(), "finds a cuBLAS that nobody has loaded"
    said = ""
    try:
        _C.matmul_int8(0, 0, 1, 1, 1, 0, -1, 0)
    except RuntimeError as error:
        said = str(error)
    assert said, "a launch without a device raises nothing"


if __name__ == "__main__":
    main(*sys.argv[1:])
