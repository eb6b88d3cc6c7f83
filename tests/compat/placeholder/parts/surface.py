from . import functional, nn, optim

__all__ = ["features", "functional", "matmul_4bit", "nn", "optim", "supported_torch_devices"]

features = {"multi_backend"}
supported_torch_devices = {"cpu"}
matmul_4bit = functional.matmul_4bit
