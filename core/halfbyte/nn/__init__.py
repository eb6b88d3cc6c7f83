"""Layers and parameters, with bitsandbytes' names and constructor signatures."""

from .embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4
from .linear4bit import Linear4bit, LinearFP4, LinearNF4
from .linear8bit import Linear8bitLt, MatmulLtState
from .params4bit import Params4bit
from .params8bit import Int8Params
from .stable_embedding import Embedding, StableEmbedding

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "MatmulLtState",
    "Params4bit",
    "StableEmbedding",
]
