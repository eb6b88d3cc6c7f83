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
def update_chunks(fields: int, tensors: int, /) -> int:
    """How many chunks the tensors have that a table of UPDATE_FIELDS int64 each, on the host, describes."""

def plan_update(
    fields: int,
    tensors: int,
    chunks: int,
    optimizer: int,
    dtype: int,
    states: int,
    tensor: int,
    chunk: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def update_coefficients(
    optimizer: int,
    hyper: tuple[float, float, float, float, float, float],
    rising: tuple[int, int],
    step: tuple[int, int],
    lr: tuple[int, int],
    scale: tuple[int, int],
    out: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def update(
    optimizer: int,
    dtype: int,
    quantized: bool,
    skip_zeros: bool,
    stochastic: bool,
    tensors: int,
    chunks: int,
    tensor: int,
    chunk: int,
    codebook1: int,
    codebook2: int,
    numbers: list[float],
    drawn: int,
    coefficients: int,
    max_unorm: float,
    eps: float,
    partial: int,
    sizes: int,
    device: int,
    stream: int,
    /,
) -> None: ...

UPDATE_FIELDS: int
UPDATE_TENSOR_BYTES: int
COEFFICIENTS_BYTES: int
