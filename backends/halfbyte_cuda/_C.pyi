# Addresses and sizes are integers; the last two arguments are the device's index (-1: as things are) and the stream.

def device_count() -> tuple[int, str]:
    """How many devices the driver shows, and why there is none.  Starts the driver."""

def archs() -> str:
    """What the module was built for, as the build named it, with commas."""

def quantize_4bit(
    x: int,
    dtype: int,
    count: int,
    format: int,
    blocksize: int,
    packed: int,
    absmax: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def dequantize_4bit(
    packed: int,
    absmax: int,
    nested: int,
    codebook: int,
    offset: int,
    format: int,
    blocksize: int,
    k: int,
    row: int,
    rows: int,
    column: int,
    columns: int,
    out: int,
    dtype: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def linear_4bit_stream(
    x: int,
    dtype: int,
    packed: int,
    absmax: int,
    nested: int,
    codebook: int,
    offset: int,
    format: int,
    blocksize: int,
    bias: int,
    m: int,
    n: int,
    k: int,
    y: int,
    tiles: int,
    depth: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def linear_4bit_tile(
    x: int,
    dtype: int,
    packed: int,
    absmax: int,
    nested: int,
    codebook: int,
    offset: int,
    format: int,
    blocksize: int,
    bias: int,
    m: int,
    n: int,
    k: int,
    y: int,
    columns: int,
    groups: int,
    turns: int,
    log_splits: int,
    device: int,
    stream: int,
    /,
) -> None: ...
