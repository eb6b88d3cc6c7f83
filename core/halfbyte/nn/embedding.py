"""Embeddings over a 4-bit or int8 table.  Lookup only: the table is frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..quant_state import QuantState
from .params4bit import Params4bit
from .params8bit import Int8Params
from .stored import Stored4bit, StoredInt8, check_options_4bit


class Embedding4bit(Stored4bit, nn.Embedding):
    """nn.Embedding with a 4-bit table, quantized when first moved to a device (the CPU counts).

    Only the rows looked up are dequantized where a row is a whole number of blocks; otherwise the whole table is, which
    is slow.

    Raises InputError for a quant_type or a quant_storage that there is not.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        check_options_4bit(torch.Size((num_embeddings, embedding_dim)), quant_type, quant_storage)
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state = None

    def full_shape(self) -> torch.Size:
        return torch.Size((self.num_embeddings, self.embedding_dim))

    def forward(self, input: Tensor) -> Tensor:
        """Integer indices of any shape -> (*indices, embedding_dim), in the table's original dtype."""
        state = self.required_state()
        if state.nested or state.blocksize is None or self.embedding_dim % state.blocksize:
            return F.embedding(input, functional.dequantize_4bit(self.weight, state, dtype=self.dtype))
        packed = functional.as_bytes(self.weight).view(self.num_embeddings, self.embedding_dim // 2)
        n_blocks = self.embedding_dim // state.blocksize
        absmax = state.absmax[: self.num_embeddings * n_blocks].view(self.num_embeddings, n_blocks)
        rows = QuantState(
            F.embedding(input, absmax).reshape(-1),
            (*input.shape, self.embedding_dim),
            state.code,
            state.blocksize,
            state.quant_type,
            state.dtype,
        )
        return functional.dequantize_4bit(F.embedding(input, packed), rows, dtype=self.dtype)


class EmbeddingNF4(Embedding4bit):
    """Embedding4bit in NF4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """Embedding4bit in FP4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class Embedding8bit(StoredInt8, nn.Embedding):
    """nn.Embedding with an int8 table, one absmax per row, quantized when first moved to a device."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Integer indices of any shape -> (*indices, embedding_dim), in the table's original dtype."""
        absmax = self.required_absmax()
        rows = F.embedding(input, self.weight)
        scale = F.embedding(input, absmax.unsqueeze(1)).reshape(-1)
        return functional.dequantize_int8(rows, scale, dtype=self.dtype)
