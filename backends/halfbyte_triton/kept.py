"""Tables that a program keeps in shared memory, on NVIDIA GPUs.

Triton's own look-up there, `tl.gather`, writes the table anew, between barriers, at every use.  Here assembly declares
an area, a program fills it once, and each look-up is one load.  The order is that of the text: declare, fill, barrier,
look-ups of indices that are loaded after it.

The area holds two codebooks of 256 floats and two tables that codes8.nearest_dynamic reads: 18 KiB.  Triton counts its
own shared memory alone, so a kernel that wants 29 to 48 KiB of that beside the area cannot start; those of the compile
tests want 4 KiB at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZE = 2048  # words of a table of bins
_SIZE: tl.constexpr = tl.constexpr(SIZE)

# Where each table begins, in bytes.
_BOOK1_AT: tl.constexpr = tl.constexpr(0)
_BOOK2_AT: tl.constexpr = tl.constexpr(4 * 256)
_TABLE1_AT: tl.constexpr = tl.constexpr(8 * 256)
_TABLE2_AT: tl.constexpr = tl.constexpr(8 * 256 + 4 * SIZE)
_AREA = 8 * 256 + 8 * SIZE

_DECLARE: tl.constexpr = tl.constexpr(f".shared .align 16 .b8 halfbyte_kept[{_AREA}]; mov.u32 $0, 0;")
# The word $2 at byte $1.
_STORE: tl.constexpr = tl.constexpr(
    "{ .reg .b32 at; mov.u32 at, halfbyte_kept; add.u32 at, at, $1; st.shared.b32 [at], $2; mov.u32 $0, 0; }"
)


def _look_up(first: tl.constexpr) -> tl.constexpr:
    """PTX: an index -> a word of the table that begins at byte `first`."""
    return tl.constexpr(
        "{ .reg .b32 at; mov.u32 at, halfbyte_kept; mad.lo.u32 at, $1, 4, at; "
        f"ld.shared.b32 $0, [at + {first.value}]; }}"
    )


KEPT_BOOK1: tl.constexpr = _look_up(_BOOK1_AT)
KEPT_BOOK2: tl.constexpr = _look_up(_BOOK2_AT)
KEPT_TABLE1: tl.constexpr = _look_up(_TABLE1_AT)
KEPT_TABLE2: tl.constexpr = _look_up(_TABLE2_AT)


@triton.jit
def _fill(table_ptr, FIRST: tl.constexpr, WORDS: tl.constexpr):
    at = tl.arange(0, WORDS)
    word = tl.load(table_ptr + at).to(tl.int32, bitcast=True)
    tl.inline_asm_elementwise(_STORE, "=r,r,r", [FIRST + at * 4, word], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def keep_tables(book1_ptr, table1_ptr, book2_ptr, table2_ptr, TWO: tl.constexpr):
    """Fill the area, once in a kernel and before all look-ups; TWO says that there are second tables."""
    tl.inline_asm_elementwise(_DECLARE, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)
    _fill(book1_ptr, _BOOK1_AT, 256)
    _fill(table1_ptr, _TABLE1_AT, _SIZE)
    if TWO:
        _fill(book2_ptr, _BOOK2_AT, 256)
        _fill(table2_ptr, _TABLE2_AT, _SIZE)
    tl.debug_barrier()


@triton.jit
def look_up_kept(index, TABLE: tl.constexpr):
    """Words, int32, of one of the tables above, KEPT_."""
    return tl.inline_asm_elementwise(TABLE, "=r,r", [index], dtype=tl.int32, is_pure=True, pack=1)
