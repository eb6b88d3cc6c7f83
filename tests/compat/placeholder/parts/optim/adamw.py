from halfbyte import optim

__all__ = ["AdamW8bit"]


class AdamW8bit(optim.AdamW8bit):
    __module__ = "bitsandbytes.optim.adamw"
