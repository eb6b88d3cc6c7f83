// update8.cu: one step of an optimizer with 8-bit states over all tensors of a plan, in place.
//
// In, out   parameters and gradients fp32, fp16 or bf16; states uint8 codes, one absmax per 256 elements.
// Work      a persistent grid strides over the chunks of all tensors alike, one thread block to a multiprocessor, whose
//           teams of eight groups have a chunk each.  A group of 32 lanes has a block, eight elements per lane, and
//           reads its next one meanwhile; the largest magnitude goes through one reduction per state, without a
//           barrier.  The tables of the codebooks are made once per thread block.
// Bound by  memory: 10.06 bytes per bf16 parameter of Adam.  Its 71 instructions keep the schedulers of an H200 busy
//           for 70 % of the time, and look-ups of 32 lanes in tables of 32 banks take three cycles; with a third state
//           they would take longer than memory, so levels are spread over all banks there.
// Agrees    codes bit for bit with the reference: state / absmax is rounded correctly.  See optimizer.cuh.
#include "optimizer.cuh"

namespace halfbyte::gpu {
namespace {

// 1 / x, correctly rounded, for x from 2^-60 to 2^100.
HALFBYTE_DEVICE float reciprocal_of(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return fmaf(fmaf(-x, r, 1.0f), r, r);
#else
  return 1.0f / x;
#endif
}

// state / largest, correctly rounded, of a whole lane: with a correctly rounded reciprocal one step is enough
// (Markstein 1990, IBM J. Res. Dev. 34), as long as the remainder is no subnormal; scaling by a power of two sees
// to that.  0 / 0 is 0.
HALFBYTE_DEVICE void divide(float* s, float largest) {
  if (largest < 0x1p-60f || largest > 0x1p100f) {
    const float factor = largest < 1.0f ? 0x1p90f : 0x1p-90f;
    largest = largest == 0.0f ? 1.0f : largest * factor;
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) s[i] = s[i] * factor;
  }
  const float r = reciprocal_of(largest);
  HALFBYTE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const float q = s[i] * r;
    s[i] = fmaf(fmaf(-q, largest, s[i]), r, q);
  }
}

template <class L, class Book>
HALFBYTE_DEVICE void encode(const Book& book, bool searched, const float* q, Words<L::run>* to) {
  HALFBYTE_UNROLL
  for (int word = 0; word < kEach / 4; ++word) {
    uint32_t code[4];
    if (searched) {
      HALFBYTE_UNROLL
      for (int i = 0; i < 4; ++i) code[i] = book.search(q[4 * word + i]);
    } else {
      HALFBYTE_UNROLL
      for (int i = 0; i < 4; ++i) code[i] = book.encode(q[4 * word + i]);
    }
    to[word * 4 / L::run].w[word * 4 % L::run / 4] = upper_bytes(code[0], code[1], code[2], code[3]);
  }
}

// What the elements of a lane are before the step; takes no registers where no zeros are skipped.
template <Optimizer kRule, bool kRare>
struct Values {
  static constexpr int states = Kept<kRule>::all;
  float p[kEach], g[kEach], s[states][kEach], old[kRare ? states : 1][kRare ? kEach : 1];

  template <class Piece, class Books>
  HALFBYTE_DEVICE Values(const Piece& piece, const Books& books, float factor) {
    piece.widen_param(p);
    piece.widen_grad(g, factor);
    HALFBYTE_UNROLL
    for (int j = 0; j < states; ++j) {
      piece.widen_state(j, books, s[j]);
      if constexpr (kRare) memcpy(old[j], s[j], sizeof(s[j]));
    }
  }
};

// kRare: whether zeros are skipped, parameters rounded stochastically or steps sized per tensor.  A load more would
// wait with those of the next block, as they share a scoreboard.
template <Optimizer kRule, class T, bool kRare, class Books>
HALFBYTE_DEVICE void step(const Update& update, const Coefficients& c, const Books& books, const Spot& spot,
                          float size, Values<kRule, kRare>& v, bool searched) {
  constexpr int states = Kept<kRule>::all;
  using Piece = Piece<kRule, T, true>;
  float u[kEach];
  apply_all<kRule, T>(c, v.p, v.g, v.s, u);
  if (!spot.whole) {
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (Piece::has(spot, i)) continue;
      u[i] = 0.0f;
      v.g[i] = 1.0f;  // not skipped: that would bring the state back
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) v.s[j][i] = 0.0f;
    }
  }

  float most = 0.0f, largest[states];
  HALFBYTE_UNROLL
  for (int j = 0; j < states; ++j) {
    largest[j] = 0.0f;
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) largest[j] = max_or_nan(largest[j], fabsf(v.s[j][i]));
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
      for (int j = 0; j < states; ++j) good = good && finite(v.s[j][i]);
      if (good) continue;
      kept |= 1u << i;
      u[i] = 0.0f;
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) v.s[j][i] = 0.0f;
    }
    HALFBYTE_UNROLL
    for (int j = 0; j < states; ++j) largest[j] = magnitude<kEach>(v.s[j]);
  }
  if constexpr (kRare) {
    if (update.skip_zeros) {
      HALFBYTE_UNROLL
      for (int i = 0; i < kEach; ++i) kept |= static_cast<uint32_t>(v.g[i] == 0.0f) << i;
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) {
        HALFBYTE_UNROLL
        for (int i = 0; i < kEach; ++i) v.s[j][i] = v.g[i] == 0.0f ? v.old[j][i] : v.s[j][i];
        largest[j] = magnitude<kEach>(v.s[j]);
      }
    }
  }
  HALFBYTE_UNROLL
  for (int i = 0; i < kEach; ++i) u[i] = v.p[i] * c.decay - u[i] * size;
  if (kept != 0) {
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) u[i] = kept >> i & 1u ? v.p[i] : u[i];
  }

  Piece piece;
  piece.narrow_param(spot, kRare && update.stochastic, c.drawn, u);
  HALFBYTE_UNROLL
  for (int j = 0; j < states; ++j) {
    piece.scale[j] = group_max(largest[j]);
    divide(v.s[j], piece.scale[j]);
    if (j >= Kept<kRule>::first) {
      encode<typename Piece::L>(books.second, searched, v.s[j], piece.state[j]);
    } else {
      encode<typename Piece::L>(books.first, searched, v.s[j], piece.state[j]);
    }
  }
  piece.write(spot);
}

// Teams of a multiprocessor, as many as registers allow, and of a thread block.
template <Optimizer kRule>
constexpr int kTeams = 5 - Kept<kRule>::all;
#if defined(HALFBYTE_SYCL)  // some devices have groups of at most 512
template <Optimizer kRule>
constexpr int kOfBlock = 1;
#else
template <Optimizer kRule>
constexpr int kOfBlock = kTeams<kRule>;
#endif

template <Optimizer kRule, class T, bool kRare, bool kSpread>
__global__ void __launch_bounds__(kUpdateThreads* kOfBlock<kRule>, kTeams<kRule> / kOfBlock<kRule>)
    update_8bit_kernel(const Update update) {
  __shared__ Books<(Kept<kRule>::second > 0), kSpread> books;
  books.fill(update.codebook1, update.codebook2);
  const bool searched = books.first.searched != 0 || books.second.searched != 0;
  const Coefficients c = coefficients_of(update);
  const uint32_t team = blockIdx.x + threadIdx.x / kUpdateThreads * gridDim.x;
  const uint32_t stride = gridDim.x * kOfBlock<kRule>, last = static_cast<uint32_t>(update.chunks) - 1u;
  const auto bounded = [=](uint32_t chunk) { return chunk < last ? chunk : last; };
  // Two ahead: the number of a tensor; one ahead: its elements.  Where they lie is read again for writing.
  int32_t number = update.chunk[bounded(team)], after = update.chunk[bounded(team + stride)];
  Piece<kRule, T, true> piece;
  piece.read(Spot(update, bounded(team), number));
  HALFBYTE_ROLL
  for (uint32_t chunk = team; chunk <= last; chunk += stride) {
    Values<kRule, kRare> values(piece, books, c.scale);
    piece.read(Spot(update, bounded(chunk + stride), after));
    const Spot spot(update, chunk, number);
    float size = c.size;
    if constexpr (kRare) size = update.sizes != nullptr ? update.sizes[number] : size;
    number = after;
    after = update.chunk[bounded(chunk + 2 * stride)];
    if (!spot.beyond()) step<kRule, T, kRare>(update, c, books, spot, size, values, searched);
  }
}

template <Optimizer kRule, class T, bool kRare, bool kSpread = false>
const char* launch(const Update& update, int shared, void* stream) {
  const unsigned grid = grid_for(update.chunks, kTeams<kRule> / kOfBlock<kRule>);
  HALFBYTE_LAUNCH((update_8bit_kernel<kRule, T, kRare, kSpread>), grid, update_threads() * kOfBlock<kRule>,
                  shared, stream, update);
  return launched();
}

template <Optimizer kRule, class T>
const char* launch_for(const Update& update, void* stream) {
  if (update.skip_zeros || update.stochastic || update.sizes != nullptr) {
    return launch<kRule, T, true>(update, 0, stream);
  }
#if !defined(HALFBYTE_PLAIN)
  if constexpr (Kept<kRule>::all > 2) {
    if (allowed(update_8bit_kernel<kRule, T, false, true>, Spread::kBytes)) {
      return launch<kRule, T, false, true>(update, Spread::kBytes, stream);
    }
  }
#endif
  return launch<kRule, T, false>(update, 0, stream);
}

}  // namespace

const char* update_8bit(const Update& update, void* stream) {
  return with_rule(update.optimizer, [&](auto rule) {
    return with_dtype(update.dtype,
                      [&](auto type) { return launch_for<rule.value, decltype(type)>(update, stream); });
  });
}

}  // namespace halfbyte::gpu
