"""Embeddings for training: whatever the optimizer's bits, the states of their table are 32-bit.

A row is seldom looked up, so that its gradients are rare and large: states of 8 bits make such training unstable.
Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2.3 (arXiv 2110.02861).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """nn.Embedding whose table has 32-bit optimizer states and starts Xavier-uniform; the padding row starts at 0."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        from ..optim import GlobalOptimManager  # not above: importing halfbyte does not load the optimizers

        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)


class StableEmbedding(Embedding):
    """Embedding followed by a layer norm in torch's default dtype.

    `norm` is the nn.LayerNorm over embedding_dim.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Integer indices of any shape -> (*indices, embedding_dim), in the table's dtype."""
        normed: Tensor = self.norm(super().forward(input).to(torch.get_default_dtype()))
        return normed.to(self.weight.dtype)
