from halfbyte import QuantState
from halfbyte.functional import dequantize_4bit, quantize_4bit

__all__ = ["QuantState", "dequantize_4bit", "matmul_4bit", "quantize_4bit"]


def matmul_4bit(A, B, quant_state):
    return A @ dequantize_4bit(B, quant_state).T
