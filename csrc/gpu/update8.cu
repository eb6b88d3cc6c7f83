// update8.cu: one step of an optimizer with 8-bit states over all tensors of a plan, in place.
//
// In, out   parameters and gradients fp32, fp16 or bf16; states uint8 codes, one absmax per 256 elements.
// Work      a persistent grid strides over the chunks of all tensors alike.  A group of 32 lanes has a block, eight
//           elements per lane, and reads its next one meanwhile; the largest magnitude goes through one reduction
//           per state, without a barrier.  The tables of the codebooks are made once per thread block.
// Bound by  memory: 10.06 bytes per bf16 parameter of Adam; its 60 instructions are two thirds of what a
//           multiprocessor issues meanwhile, and shared memory is as busy: four lookups with a threefold conflict.
// Agrees    codes bit for bit with the reference: state / absmax is rounded correctly.  See optimizer.cuh.
#include "optimizer.cuh"

namespace halfbyte::gpu {
namespace {

// state / largest, correctly rounded, of a whole lane: with a correctly rounded reciprocal one step is enough
// (Markstein 1990, IBM J. Res. Dev. 34), as long as the remainder is no subnormal; scaling by a power of two sees
// to that.  0 / 0 is 0.
HALFBYTE_DEVICE void divide(float* s, float largest) {
  if (largest < 0x1p-60f || largest > 0x1p100f) {
    const float factor = largest < 1.0f ? 0x1p90f : 0x1p-90f;
    largest = largest * factor;
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) s[i] = s[i] * factor;
  }
  const float r = largest == 0.0f ? 0.0f : 1.0f / largest;
  HALFBYTE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const float q = s[i] * r;
    s[i] = fmaf(fmaf(-q, largest, s[i]), r, q);
  }
}

template <class L, class Book>
HALFBYTE_DEVICE void encode(const Book& book, const float* q, Words<L::run>* to) {
  const bool searched = book.searched != 0;
  HALFBYTE_UNROLL
  for (int word = 0; word < kEach / 4; ++word) {
    uint32_t codes = 0;
    if (searched) {
      HALFBYTE_UNROLL
      for (int i = 3; i >= 0; --i) codes = push_byte(codes, book.search(q[4 * word + i]));
    } else {
      HALFBYTE_UNROLL
      for (int i = 3; i >= 0; --i) codes = push_byte(codes, book.encode(q[4 * word + i]));
    }
    to[word * 4 / L::run].w[word * 4 % L::run / 4] = codes;
  }
}

// kRare: whether zeros are skipped or parameters rounded stochastically.
template <Optimizer kRule, class T, bool kRare>
HALFBYTE_DEVICE void step(const Update& update, const Coefficients& c,
                          const Books<(Kept<kRule>::second > 0)>& books, const UpdateTensor& t, float size,
                          int64_t first, const Piece<kRule, T, true>& piece) {
  constexpr int states = Kept<kRule>::all;
  using L = Lanes8<T, true>;
  float p[kEach], g[kEach], u[kEach], s[states][kEach];
  piece.widen_param(p);
  piece.widen_grad(g, c.scale);
  HALFBYTE_UNROLL
  for (int j = 0; j < states; ++j) piece.widen_state(j, books, s[j]);
  apply_all<kRule, T>(c, p, g, s, u);
  if (!piece.whole) {
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (Piece<kRule, T, true>::has(t, first, i)) continue;
      u[i] = 0.0f;
      g[i] = 1.0f;  // not skipped: that would bring the state back
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) s[j][i] = 0.0f;
    }
  }

  float most = 0.0f, largest[states];
  HALFBYTE_UNROLL
  for (int j = 0; j < states; ++j) {
    largest[j] = 0.0f;
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) largest[j] = max_or_nan(largest[j], fabsf(s[j][i]));
    most = max_or_nan(most, largest[j]);
  }
  if constexpr (kRule != Optimizer::momentum) {
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) most = max_or_nan(most, fabsf(u[i]));
  }
  uint32_t kept = 0;  // elements that stay where they are
  if (any_lane(!finite(most))) {
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) {
      bool good = finite(u[i]);
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) good = good && finite(s[j][i]);
      if (good) continue;
      kept |= 1u << i;
      u[i] = 0.0f;
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) s[j][i] = 0.0f;
    }
    HALFBYTE_UNROLL
    for (int j = 0; j < states; ++j) largest[j] = magnitude<kEach>(s[j]);
  }
  if constexpr (kRare) {
    if (update.skip_zeros) {
      HALFBYTE_UNROLL
      for (int i = 0; i < kEach; ++i) kept |= static_cast<uint32_t>(g[i] == 0.0f) << i;
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) {
        float old[kEach];
        piece.widen_state(j, books, old);
        HALFBYTE_UNROLL
        for (int i = 0; i < kEach; ++i) s[j][i] = g[i] == 0.0f ? old[i] : s[j][i];
        largest[j] = magnitude<kEach>(s[j]);
      }
    }
  }
  HALFBYTE_UNROLL
  for (int i = 0; i < kEach; ++i) u[i] = p[i] * c.decay - u[i] * size;
  if (kept != 0) {
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) u[i] = kept >> i & 1u ? p[i] : u[i];
  }
  write_param<T, true>(t, first, piece.whole, kRare && update.stochastic, c.drawn, u);

  HALFBYTE_UNROLL
  for (int j = 0; j < states; ++j) {
    const float its = group_max(largest[j]);
    divide(s[j], its);
    Words<L::run> codes[L::runs];
    if (j >= Kept<kRule>::first) {
      encode<L>(books.second, s[j], codes);
    } else {
      encode<L>(books.first, s[j], codes);
    }
    HALFBYTE_UNROLL
    for (int r = 0; r < L::runs; ++r) {
      write_run<L::run>(Piece<kRule, T, true>::state_of(t, j), first + L::place(r), t.count, piece.whole,
                        codes[r]);
    }
    if (threadIdx.x % kGroup == 0 && first < t.count) {
      Piece<kRule, T, true>::absmax_of(t, j)[first / kUpdateBlock] = its;
    }
  }
}

template <Optimizer kRule, class T, bool kRare>
__global__ void __launch_bounds__(kUpdateThreads, 3) update_8bit_kernel(const Update update) {
  using Piece = Piece<kRule, T, true>;
  __shared__ Books<(Kept<kRule>::second > 0)> books;
  books.fill(update.codebook1, update.codebook2);
  const Coefficients c = coefficients_of(update);
  const int64_t stride = gridDim.x;
  // Two ahead: the number of a tensor; one ahead: its elements.
  int32_t number = update.chunk[blockIdx.x], after = number;
  if (blockIdx.x + stride < update.chunks) after = update.chunk[blockIdx.x + stride];
  Piece piece;
  piece.read(update.tensor[number], piece_begins(blockIdx.x, update.tensor[number]));
  HALFBYTE_ROLL
  for (int64_t chunk = blockIdx.x; chunk < update.chunks; chunk += stride) {
    Piece next = piece;
    if (chunk + stride < update.chunks) {
      next.read(update.tensor[after], piece_begins(chunk + stride, update.tensor[after]));
    }
    const UpdateTensor& t = update.tensor[number];
    const int64_t first = piece_begins(chunk, t);
    if (!beyond(first, t.count)) {
      const float size = update.sizes != nullptr ? update.sizes[number] : c.size;
      step<kRule, T, kRare>(update, c, books, t, size, first, piece);
    }
    piece = next;
    number = after;
    if (chunk + 2 * stride < update.chunks) after = update.chunk[chunk + 2 * stride];
  }
}

template <Optimizer kRule, class T>
const char* launch(const Update& update, void* stream) {
  const unsigned grid = grid_for(update.chunks, 3);
  if (update.skip_zeros || update.stochastic) {
    HALFBYTE_LAUNCH((update_8bit_kernel<kRule, T, true>), grid, kUpdateThreads, 0, stream, update);
  } else {
    HALFBYTE_LAUNCH((update_8bit_kernel<kRule, T, false>), grid, kUpdateThreads, 0, stream, update);
  }
  return launched();
}

}  // namespace

const char* update_8bit(const Update& update, void* stream) {
  return with_rule(update.optimizer, [&](auto rule) {
    return with_dtype(update.dtype,
                      [&](auto type) { return launch<rule.value, decltype(type)>(update, stream); });
  });
}

}  // namespace halfbyte::gpu
