"""bitsandbytes.autograd."""
