// optimizer.cuh: what the kernels of the optimizer updates share: the rules, and 256 elements in a group of lanes.
//
// Agrees    bit for bit with ops/rules.py, apart from this: with 16-bit parameters square root and quotient of the
//           update are approximate (a few ulp of fp32), where v below 2^-126 counts as
//           0.  They decide neither states nor codes.
#pragma once
#include "blockwise.cuh"
#include "codes8.cuh"
#include "halfbyte/gpu_optimizer.h"

namespace halfbyte::gpu {

constexpr int kEach = kUpdateBlock / kGroup;  // elements per lane: a group has a block of 256
constexpr int kGroups = static_cast<int>(kUpdateChunk / kUpdateBlock);
constexpr int kUpdateThreads = kGroups * static_cast<int>(kGroup);
inline int update_threads() { return kGroups * static_cast<int>(group_lanes()); }  // for a launch

template <Optimizer kRule>
struct Kept {
  static constexpr int first = kRule == Optimizer::ademamix ? 2 : 1;
  static constexpr int second = kRule == Optimizer::adam || kRule == Optimizer::ademamix ? 1 : 0;
  static constexpr int all = first + second;
  static constexpr bool decoupled = second != 0 || kRule == Optimizer::lion;
};

// -- primitives ------------------------------------------------------------------------------------------------

// The larger one; NaN where either is.
HALFBYTE_DEVICE float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
#else
  return a > b || a != a ? a : b;
#endif
}

// The largest of the group, of numbers without a sign; NaN where one is.
HALFBYTE_DEVICE float group_max(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return as_float(__reduce_max_sync(0xffffffffu, as_bits(value)));
#else
  for (int mask = kGroup / 2; mask > 0; mask /= 2) value = max_or_nan(value, HALFBYTE_SHFL_XOR(value, mask));
  return value;
#endif
}

// Whether it holds in any lane of those in lockstep, which may be two groups.
HALFBYTE_DEVICE bool any_lane(bool holds) {
#if defined(HALFBYTE_EMULATE)
  for (int mask = HALFBYTE_WARP / 2; mask > 0; mask /= 2) holds |= HALFBYTE_SHFL_XOR(holds, mask);
  return holds;
#elif defined(HALFBYTE_SYCL)
  return xpu::any_lane(holds);
#elif defined(__HIP__)
  return __any(holds);
#else
  return __any_sync(0xffffffffu, holds);
#endif
}

template <bool kExact>
HALFBYTE_DEVICE float root(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (!kExact) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#endif
  return sqrtf(x);
}

template <bool kExact>
HALFBYTE_DEVICE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  if constexpr (!kExact) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
    return a * y;
  }
#endif
  return a / b;
}

HALFBYTE_DEVICE bool finite(float x) { return fabsf(x) < INFINITY; }

HALFBYTE_DEVICE uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;  // Wellons, hash-prospector, lowbias32
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// -- memory ----------------------------------------------------------------------------------------------------

// Words that are read once, from memory that this thread may write later.
template <int kBytes>
HALFBYTE_DEVICE Words<kBytes> stream(const void* p) {
  Words<kBytes> to;
#if defined(HALFBYTE_PLAIN)
#define HALFBYTE_STREAM(type) *static_cast<const type*>(p)
#else
#define HALFBYTE_STREAM(type) __ldcs(static_cast<const type*>(p))
#endif
  if constexpr (kBytes == 16) {
    const uint4 v = HALFBYTE_STREAM(uint4);
    to = {v.x, v.y, v.z, v.w};
  } else if constexpr (kBytes == 8) {
    const uint2 v = HALFBYTE_STREAM(uint2);
    to = {v.x, v.y};
  } else {
    static_assert(kBytes == 4);
    to = {HALFBYTE_STREAM(uint32_t)};
  }
#undef HALFBYTE_STREAM
  return to;
}

// Writes them, as one access: an assignment of a vector may become four of its parts.
template <int kBytes>
HALFBYTE_DEVICE void stream_to(void* p, Words<kBytes> from) {
#if defined(HALFBYTE_PLAIN)
  store<kBytes>(p, from);
#else
  if constexpr (kBytes == 16) {
    __stcs(static_cast<uint4*>(p), uint4{from.w[0], from.w[1], from.w[2], from.w[3]});
  } else if constexpr (kBytes == 8) {
    __stcs(static_cast<uint2*>(p), uint2{from.w[0], from.w[1]});
  } else {
    static_assert(kBytes == 4);
    __stcs(static_cast<uint32_t*>(p), from.w[0]);
  }
#endif
}

// Elements [at, at + kBytes / sizeof(T)) of x; not kWhole: of any alignment, zeros from `count` on.
template <int kBytes, bool kWhole, class T>
HALFBYTE_DEVICE Words<kBytes> read_run(const T* x, int64_t at, int64_t count) {
  if constexpr (kWhole) {
    return stream<kBytes>(x + at);
  } else {
    Words<kBytes> to = {};
    T parts[kBytes / sizeof(T)] = {};
    HALFBYTE_ROLL
    for (int i = 0; i < static_cast<int>(kBytes / sizeof(T)); ++i) {
      if (at + i < count) parts[i] = x[at + i];
    }
    memcpy(&to, parts, kBytes);
    return to;
  }
}

template <int kBytes, bool kWhole, class T>
HALFBYTE_DEVICE void write_run(T* x, int64_t at, int64_t count, Words<kBytes> from) {
  if constexpr (kWhole) {
    stream_to<kBytes>(x + at, from);
  } else {
    T parts[kBytes / sizeof(T)];
    memcpy(parts, &from, kBytes);
    HALFBYTE_ROLL
    for (int i = 0; i < static_cast<int>(kBytes / sizeof(T)); ++i) {
      if (at + i < count) x[at + i] = parts[i];
    }
  }
}

template <class T, int kCount>
HALFBYTE_DEVICE void widen_run(const Words<kCount * sizeof(T)>& from, float* to) {
  HALFBYTE_UNROLL
  for (int i = 0; i < static_cast<int>(kCount * sizeof(T) / 4); ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = as_float(from.w[i]);
    } else {
      widen2<T>(from.w[i], to[2 * i], to[2 * i + 1]);
    }
  }
}

template <class T, int kCount>
HALFBYTE_DEVICE Words<kCount * sizeof(T)> narrow_run(const float* from) {
  Words<kCount * sizeof(T)> to;
  HALFBYTE_UNROLL
  for (int i = 0; i < static_cast<int>(kCount * sizeof(T) / 4); ++i) {
    if constexpr (sizeof(T) == 4) {
      to.w[i] = as_bits(from[i]);
    } else {
      to.w[i] = narrow2<T>(from[2 * i], from[2 * i + 1]);
    }
  }
  return to;
}

// -- a block of 256 elements -----------------------------------------------------------------------------------

// How a group's lanes share it: each has one run of 8, or two of 4 where 8 would be wider than 16 bytes.
template <class T, bool k8>
struct Lanes8 {
  static constexpr int run = k8 && sizeof(T) == 2 ? 8 : 4, runs = kEach / run;

  // Where this lane's run begins within the block.
  static HALFBYTE_DEVICE int place(int number) {
    return number * kGroup * run + static_cast<int>(threadIdx.x) % kGroup * run;
  }
};

// A block of a tensor.
struct Spot {
  UpdateTensor t;
  int64_t block;  // its number in the tensor
  bool whole;     // whether it is full and lies as wide accesses want it

  // This thread's group's block of a chunk; of several teams, each has a chunk of its own.
  HALFBYTE_DEVICE Spot(const Update& update, uint32_t chunk, int32_t number) {
    Words<16> words[sizeof(UpdateTensor) / 16];
    HALFBYTE_UNROLL
    for (unsigned i = 0; i < sizeof(UpdateTensor) / 16; ++i) {
      words[i] = load<16>(reinterpret_cast<const uint4*>(update.tensor + number) + i);
    }
    memcpy(&t, words, sizeof(t));
    block = (chunk - t.first) * kGroups + threadIdx.x / kGroup % kGroups;
    whole = t.whole != 0 && (block + 1) * kUpdateBlock <= t.count;
  }

  HALFBYTE_DEVICE int64_t first() const { return block * kUpdateBlock; }

  // Whether all lanes in lockstep with this one have a block beyond the tensor, so that none waits for another.
  HALFBYTE_DEVICE bool beyond() const {
    int64_t begin = first();
#if defined(HALFBYTE_EMULATE) || defined(__HIP__)
    if (threadIdx.x / kGroup % 2 != 0) begin -= kUpdateBlock;  // a wave of 64 may begin there
#endif
    return begin >= t.count;
  }
};

// A lane's part of a block as it lies in memory.
template <Optimizer kRule, class T, bool k8>
struct Piece {
  static constexpr int states = Kept<kRule>::all, firsts = Kept<kRule>::first;
  using L = Lanes8<T, k8>;
  using S = std::conditional_t<k8, uint8_t, float>;
  using Run = Words<L::run * sizeof(T)>;
  using StateRun = Words<L::run * sizeof(S)>;

  Run p[L::runs], g[L::runs];
  StateRun state[states][L::runs];
  float scale[k8 ? states : 1];

  static HALFBYTE_DEVICE S* state_of(const UpdateTensor& t, int j) {
    if (j >= firsts) return static_cast<S*>(t.state2);
    return static_cast<S*>(t.state1) + (j == 1 ? t.count : 0);
  }

  static HALFBYTE_DEVICE float* absmax_of(const UpdateTensor& t, int j) {
    return j >= firsts ? t.absmax2 : t.absmax1 + (j == 1 ? t.slow : 0);
  }

  HALFBYTE_DEVICE void read(const Spot& spot) {
    if (spot.whole) {
      read_as<true>(spot);
    } else {
      read_as<false>(spot);
    }
  }

  template <bool kWhole>
  HALFBYTE_DEVICE void read_as(const Spot& spot) {
    const UpdateTensor& t = spot.t;
    HALFBYTE_UNROLL
    for (int r = 0; r < L::runs; ++r) {
      const int64_t at = spot.first() + L::place(r);
      p[r] = read_run<sizeof(Run), kWhole>(static_cast<const T*>(t.param), at, t.count);
      g[r] = read_run<sizeof(Run), kWhole>(static_cast<const T*>(t.grad), at, t.count);
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) {
        state[j][r] = read_run<sizeof(StateRun), kWhole>(static_cast<const S*>(state_of(t, j)), at, t.count);
      }
    }
    if constexpr (k8) {
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) {
        const bool there = kWhole || spot.first() < t.count;
        scale[j] = there ? absmax_of(t, j)[spot.block] : 0.0f;
      }
    }
  }

  // Of what read() has: parameters and states; scales are written by one lane.
  HALFBYTE_DEVICE void write(const Spot& spot) const {
    if (spot.whole) {
      write_as<true>(spot);
    } else {
      write_as<false>(spot);
    }
  }

  template <bool kWhole>
  HALFBYTE_DEVICE void write_as(const Spot& spot) const {
    const UpdateTensor& t = spot.t;
    HALFBYTE_UNROLL
    for (int r = 0; r < L::runs; ++r) {
      const int64_t at = spot.first() + L::place(r);
      write_run<sizeof(Run), kWhole>(static_cast<T*>(t.param), at, t.count, p[r]);
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) {
        write_run<sizeof(StateRun), kWhole>(state_of(t, j), at, t.count, state[j][r]);
      }
    }
    if constexpr (k8) {
      if (threadIdx.x % kGroup != 0 || spot.first() >= t.count) return;
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) absmax_of(t, j)[spot.block] = scale[j];
    }
  }

  // Whether element i of this lane is there.  Where it is not, codes are 0, which may be no state of 0.
  static HALFBYTE_DEVICE bool has(const Spot& spot, int i) {
    return spot.first() + L::place(i / L::run) + i % L::run < spot.t.count;
  }

  HALFBYTE_DEVICE void widen_param(float* to) const {
    HALFBYTE_UNROLL
    for (int r = 0; r < L::runs; ++r) widen_run<T, L::run>(p[r], to + r * L::run);
  }

  HALFBYTE_DEVICE void widen_grad(float* to, float factor) const {
    HALFBYTE_UNROLL
    for (int r = 0; r < L::runs; ++r) widen_run<T, L::run>(g[r], to + r * L::run);
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) to[i] = to[i] * factor;
  }

  template <class Books>
  HALFBYTE_DEVICE void widen_state(int j, const Books& books, float* to) const {
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if constexpr (k8) {
        const uint32_t word = state[j][i / L::run].w[i % L::run / 4];
        const float level = books.level(word, i % 4, j >= firsts);
        to[i] = level * scale[j];
      } else {
        to[i] = as_float(state[j][i / 4].w[i % 4]);
      }
    }
  }

  // Takes parameters, rounded; at random where the step says so.
  HALFBYTE_DEVICE void narrow_param(const Spot& spot, bool stochastic, uint32_t drawn, float* moved) {
    if constexpr (std::is_same_v<T, BFloat>) {
      if (stochastic) {
        const uint32_t key = hash32(spot.t.seed ^ drawn);
        for (int i = 0; i < kEach; ++i) {
          const uint64_t index = static_cast<uint64_t>(spot.first() + L::place(i / L::run) + i % L::run);
          const uint32_t folded = static_cast<uint32_t>(index ^ (index >> 32));
          if (finite(moved[i])) {
            moved[i] = as_float((as_bits(moved[i]) + (hash32(folded ^ key) >> 16)) & 0xffff0000u);
          }
        }
      }
    }
    HALFBYTE_UNROLL
    for (int r = 0; r < L::runs; ++r) p[r] = narrow_run<T, L::run>(moved + r * L::run);
  }
};

// -- the rules -------------------------------------------------------------------------------------------------

HALFBYTE_DEVICE float mixed(float state, float beta, float value, float rest) {
  return state * beta + value * rest;
}

// The update u of one element; s becomes the new states.
template <Optimizer kRule, bool kExact>
HALFBYTE_DEVICE float apply(const Coefficients& c, float g, float* s) {
  if constexpr (kRule == Optimizer::adam) {
    s[0] = mixed(s[0], c.beta1, g, c.rest1);
    s[1] = mixed(s[1], c.beta2, g * g, c.rest2);
    return quotient<kExact>(s[0], root<kExact>(s[1]) + c.eps);
  } else if constexpr (kRule == Optimizer::ademamix) {
    s[0] = mixed(s[0], c.beta1, g, c.rest1);
    s[1] = mixed(s[1], c.beta3, g, c.rest3);
    s[2] = mixed(s[2], c.beta2, g * g, c.rest2);
    return quotient<kExact>(s[0] * c.inverse1 + s[1] * c.alpha, root<kExact>(s[2]) * c.inverse2 + c.eps);
  } else if constexpr (kRule == Optimizer::lion) {
    const float u = mixed(s[0], c.beta1, g, c.rest1);
    s[0] = mixed(s[0], c.beta2, g, c.rest2);
    return u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : u;  // NaN stays
  } else if constexpr (kRule == Optimizer::momentum) {
    s[0] = s[0] * c.beta1 + g;
    return s[0];
  } else {
    if constexpr (kRule == Optimizer::rmsprop) {
      s[0] = mixed(s[0], c.beta1, g * g, c.rest1);
    } else {
      s[0] = s[0] + g * g;
    }
    return quotient<kExact>(g, root<kExact>(s[0]) + c.eps);
  }
}

// A lane's eight elements, moved: u and the new states s, before anything is skipped.
template <Optimizer kRule, class T>
HALFBYTE_DEVICE void apply_all(const Coefficients& c, const float* p, const float* g,
                               float (&s)[Kept<kRule>::all][kEach], float* u) {
  HALFBYTE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    float one[Kept<kRule>::all];
    HALFBYTE_UNROLL
    for (int j = 0; j < Kept<kRule>::all; ++j) one[j] = s[j][i];
    const float its = Kept<kRule>::decoupled ? g[i] : g[i] + p[i] * c.coupled;
    u[i] = apply<kRule, sizeof(T) == 4>(c, its, one);
    HALFBYTE_UNROLL
    for (int j = 0; j < Kept<kRule>::all; ++j) s[j][i] = one[j];
  }
}

HALFBYTE_DEVICE Coefficients coefficients_of(const Update& update) {
  return update.coefficients != nullptr ? *update.coefficients : update.host;
}

// f(std::integral_constant<Optimizer, ...>).
template <class Function>
const char* with_rule(Optimizer optimizer, const Function& f) {
  switch (optimizer) {
    case Optimizer::adam:
      return f(std::integral_constant<Optimizer, Optimizer::adam>());
    case Optimizer::ademamix:
      return f(std::integral_constant<Optimizer, Optimizer::ademamix>());
    case Optimizer::lion:
      return f(std::integral_constant<Optimizer, Optimizer::lion>());
    case Optimizer::momentum:
      return f(std::integral_constant<Optimizer, Optimizer::momentum>());
    case Optimizer::rmsprop:
      return f(std::integral_constant<Optimizer, Optimizer::rmsprop>());
    case Optimizer::adagrad:
      return f(std::integral_constant<Optimizer, Optimizer::adagrad>());
  }
  return "unknown optimizer";
}

}  // namespace halfbyte::gpu
