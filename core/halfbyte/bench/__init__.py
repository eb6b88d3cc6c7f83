"""Speed, measured as ratios in one run: `halfbyte bench`."""

LIBRARIES = ("halfbyte", "bitsandbytes", "torch")
PEERS = ("humming",)  # on a GPU, and only where asked for
