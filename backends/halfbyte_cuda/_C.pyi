# Addresses and sizes are integers; the last two arguments are the device's index (-1: as things are) and the address
# of the stream.  module.cpp and halfbyte/gpu.h say what the others are.

few_rows: int  # the most rows of x that linear_4bit and linear_int8_w8a16 take

def device_count() -> tuple[int, str]:
    """How many devices the driver shows, and why there is none.  Starts the driver."""

def archs() -> str:
    """What the module was built for, as the build named it, with commas."""

def managed_alloc(size: int, device: int, /) -> int: ...
def managed_free(data: int, device: int, /) -> None: ...
def managed_prefetch(data: int, size: int, device: int, stream: int, /) -> None: ...
def quantize_4bit(
    x: int, dtype: int, count: int, format: int, blocksize: int, packed: int, absmax: int, device: int, stream: int, /
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
def linear_4bit(
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
    device: int,
    stream: int,
    /,
) -> None: ...
def quantize_8bit(
    x: int, dtype: int, count: int, codebook: int, blocksize: int, codes: int, absmax: int, device: int, stream: int, /
) -> None: ...
def dequantize_8bit(
    codes: int,
    absmax: int,
    codebook: int,
    blocksize: int,
    out: int,
    dtype: int,
    count: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def quantize_int8_rows(
    x: int,
    dtype: int,
    rows: int,
    k: int,
    threshold: float,
    zero: bool,
    q: int,
    absmax: int,
    outlier_columns: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def dequantize_int8(
    q: int,
    wide: bool,
    row_absmax: int,
    col_absmax: int,
    bias: int,
    out: int,
    dtype: int,
    rows: int,
    n: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def matmul_int8(a: int, b: int, m: int, n: int, k: int, out: int, device: int, stream: int, /) -> None: ...
def list_columns(flags: int, k: int, list: int, size: int, device: int, stream: int, /) -> None: ...
def int8_workspace(m: int, k: int, /) -> int:
    """Bytes that linear_int8_exact works in."""

def linear_int8_exact(
    x: int,
    dtype: int,
    threshold: float,
    workspace: int,
    weight: int,
    weight_absmax: int,
    bias: int,
    m: int,
    n: int,
    k: int,
    y: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def scale_int8(
    x: int,
    dtype: int,
    row_absmax: int,
    list: int,
    size: int,
    sums: int,
    weight: int,
    weight_absmax: int,
    bias: int,
    m: int,
    n: int,
    k: int,
    y: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def linear_int8_w8a16(
    x: int,
    dtype: int,
    weight: int,
    weight_absmax: int,
    bias: int,
    m: int,
    n: int,
    k: int,
    y: int,
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

# -- csrc/cuda, with sm_90a only ---

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
def linear_4bit_wide(
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
    splits: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def linear_int8_tensor_workspace(m: int, n: int, k: int, threshold: float, /) -> int:
    """Bytes that linear_int8_tensor works in."""

def linear_int8_tensor(
    x: int,
    dtype: int,
    threshold: float,
    workspace: int,
    weight: int,
    weight_absmax: int,
    bias: int,
    m: int,
    n: int,
    k: int,
    y: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def has_cublas() -> bool:
    """Whether the process has loaded a cuBLAS that linear_4bit_backward can call."""

def linear_4bit_backward(
    dy: int,
    dtype: int,
    packed: int,
    absmax: int,
    nested: int,
    codebook: int,
    offset: int,
    format: int,
    blocksize: int,
    m: int,
    n: int,
    k: int,
    slab: int,
    columns: int,
    dx: int,
    handle: int,
    device: int,
    stream: int,
    /,
) -> None:
    """`slab` has room for `columns` columns of the weight; `handle` is cuBLAS's for the device and the stream."""
