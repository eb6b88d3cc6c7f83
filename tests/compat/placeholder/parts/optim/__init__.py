from .adamw import AdamW8bit

__all__ = ["AdamW8bit"]
