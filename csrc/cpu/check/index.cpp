// index.cpp: the arithmetic of index.h past 2^31 and 2^32.  It compiles or it is wrong.
#include "../index.h"

namespace halfbyte::cpu {
namespace {

constexpr int64_t p31 = int64_t{1} << 31, p32 = int64_t{1} << 32, p33 = int64_t{1} << 33,
                  p40 = int64_t{1} << 40;

static_assert(min64(p32, 7) == 7 && min64(-p32, 7) == -p32);
static_assert(max64(p32, 7) == p32 && max64(-p32, 7) == 7);

static_assert(ceil_div(p31 + 1, 2) == (int64_t{1} << 30) + 1);
static_assert(ceil_div(p33 + 7, 65536) == (int64_t{1} << 17) + 1);
static_assert(ceil_div(p40, 65536) == int64_t{1} << 24);
static_assert(ceil_div(0, 64) == 0);
static_assert(round_up(p31 + 1, 64) == p31 + 64);
static_assert(round_up(p33 + 7, 128) == p33 + 128);
static_assert(round_up(p40, 64) == p40);

static_assert(log2_of(32) == 5 && log2_of(4096) == 12 && log2_of(p40) == 40);

// More work than an int counts still means at least one thread and at most those there are.
static_assert(team(8, p31 + 1, 16384) == 8);
static_assert(team(8, p40, 1) == 8);
static_assert(team(8, p32, p31) == 2);
static_assert(team(8, 0, 16384) == 1);
static_assert(team(2147483647, p40, 1) == 2147483647);

constexpr bool same(Span a, int64_t first, int64_t size) { return a.first == first && a.size == size; }

static_assert(same(blocks_of(p31 + 1, 1, 6), p31 / 64, 1));
static_assert(same(blocks_of(p32 - 1, 2, 6), p32 / 64 - 1, 2));  // one element on either side of 2^32
static_assert(same(blocks_of(p33 + 7, 4096, 12), p33 / 4096, 2));
static_assert(same(blocks_of(p40 + 32, 65536, 5), p40 / 32 + 1, 2048));
static_assert(same(blocks_of(0, p40, 5), 0, p40 / 32));
static_assert(same(blocks_of(p40, 0, 5), p40 / 32, 0));

static_assert(tile_rows_of(p33 + 7, 8, 64) == 64);
static_assert(tile_rows_of(p33 + 7, 1, p40) == p33 + 8);
static_assert(tile_rows_of(9, 2, 64) == 8);
static_assert(tile_rows_of(0, 2, 64) == 4);

}  // namespace
}  // namespace halfbyte::cpu
