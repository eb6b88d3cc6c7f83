"""bitsandbytes.cextension: what callers read of it; there is no shared library."""

import torch

__all__ = ["BNB_BACKEND", "HIP_ENVIRONMENT"]

HIP_ENVIRONMENT = torch.version.hip is not None
BNB_BACKEND = "ROCm" if HIP_ENVIRONMENT else "CUDA" if torch.version.cuda else "CPU"
