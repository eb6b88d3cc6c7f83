// optimizer.h: one step of an optimizer over a list of tensors, in place; ops/rules.py has the formulas.
//
// In, out   parameters and gradients fp32, fp16 or bf16; states fp32, or 8-bit codes of a codebook with an absmax
//           per block of `blocksize` elements.
// Work      tensors are cut into chunks of whole blocks, and the chunks of all tensors are handed to threads one
//           by one, so ten thousand small tensors and one large one are the same work.  A block of 8-bit states
//           is decoded, moved and kept in L1 until its absmax is known, then encoded.
// Trust     with max_unorm a first pass over the chunks adds up the norms of parameter and update, in fp64 and
//           chunk by chunk in order: the result does not depend on the threads.
// Bound by  memory, the 8-bit ones on two cores also by looking up codes.
// Agrees    bit for bit with the reference: products and sums are rounded one by one, division and square root
//           are IEEE, codes go to the nearest level.  Norms are added up in another order.
#pragma once
#include "eightbit.h"

namespace halfbyte::cpu {
namespace {

inline constexpr int64_t kMostBlock = 4096;
inline constexpr int64_t kUpdateChunk = 16384;  // elements

template <Optimizer optimizer>
struct Kept {
  static constexpr int first = optimizer == Optimizer::ademamix ? 2 : 1;
  static constexpr int second = optimizer == Optimizer::adam || optimizer == Optimizer::ademamix ? 1 : 0;
  static constexpr int all = first + second;
  static constexpr bool decoupled = second != 0 || optimizer == Optimizer::lion;
};

// The update u of W elements; s becomes the new states.
template <class V, Optimizer optimizer>
HALFBYTE_INLINE typename V::F rule(const Coefficients& c, typename V::F g, typename V::F* s) {
  using F = typename V::F;
  const auto mixed = [&](F state, float beta, F value, float rest) {
    return V::add(V::mul(state, V::set1(beta)), V::mul(value, V::set1(rest)));
  };
  if constexpr (optimizer == Optimizer::adam) {
    s[0] = mixed(s[0], c.beta1, g, c.rest1);
    s[1] = mixed(s[1], c.beta2, V::mul(g, g), c.rest2);
    return V::div(s[0], V::add(V::sqrt(s[1]), V::set1(c.eps)));
  } else if constexpr (optimizer == Optimizer::ademamix) {
    s[0] = mixed(s[0], c.beta1, g, c.rest1);
    s[1] = mixed(s[1], c.beta3, g, c.rest3);
    s[2] = mixed(s[2], c.beta2, V::mul(g, g), c.rest2);
    const F above = V::add(V::mul(s[0], V::set1(c.inverse1)), V::mul(s[1], V::set1(c.alpha)));
    return V::div(above, V::add(V::mul(V::sqrt(s[2]), V::set1(c.inverse2)), V::set1(c.eps)));
  } else if constexpr (optimizer == Optimizer::lion) {
    const F u = V::sign(mixed(s[0], c.beta1, g, c.rest1));
    s[0] = mixed(s[0], c.beta2, g, c.rest2);
    return u;
  } else if constexpr (optimizer == Optimizer::momentum) {
    s[0] = V::add(V::mul(s[0], V::set1(c.beta1)), g);
    return s[0];
  } else {
    if constexpr (optimizer == Optimizer::rmsprop) {
      s[0] = mixed(s[0], c.beta1, V::mul(g, g), c.rest1);
    } else {
      s[0] = V::add(s[0], V::mul(g, g));
    }
    return V::div(g, V::add(V::sqrt(s[0]), V::set1(c.eps)));
  }
}

// Source: Wellons, hash-prospector, lowbias32.
HALFBYTE_INLINE uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

HALFBYTE_INLINE uint16_t stochastic_bfloat(float value, uint32_t drawn) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  if ((bits & 0x7fffffffu) == 0x7f800000u) return static_cast<uint16_t>(bits >> 16);
  return static_cast<uint16_t>((bits + drawn) >> 16);
}

// Rounds to the parameter's type; `first` is the flat position of values[0].
template <class T>
HALFBYTE_INLINE void store_stochastic(T*, const float*, int64_t, int64_t, uint32_t) {}
HALFBYTE_INLINE void store_stochastic(BFloat* p, const float* values, int64_t count, int64_t first,
                                      uint32_t key) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t index = static_cast<uint64_t>(first + i);
    const uint32_t folded = static_cast<uint32_t>(index ^ (index >> 32));
    write(p + i, BFloat{stochastic_bfloat(values[i], hash32(folded ^ key) >> 16)});
  }
}

// Sums of squares of what is finite.
struct Norms {
  double param, update;
};

template <class V>
HALFBYTE_INLINE double sum_of_squares(typename V::F a) {
  float lanes[V::W];
  V::store(lanes, V::where(V::mask_finite(a), V::set1(0.0f), a));
  double sum = 0.0;
  for (int i = 0; i < V::W; ++i) sum += static_cast<double>(lanes[i]) * static_cast<double>(lanes[i]);
  return sum;
}

// What one vector of elements is before the step, and its update.  Elements that are not there are 0.
template <class V, Optimizer optimizer, class T>
struct Moving {
  static constexpr int states = Kept<optimizer>::all;
  typename V::F p, scaled, u, before[states], after[states];

  HALFBYTE_INLINE Moving(const Update& update, const T* param, const T* grad, float* const* state, int64_t i,
                         int64_t size) {
    p = load_part<V>(param + i, size);
    scaled = V::mul(load_part<V>(grad + i, size), V::set1(update.grad_scale));
    typename V::F g = scaled;
    if constexpr (!Kept<optimizer>::decoupled) g = V::add(g, V::mul(p, V::set1(update.c.coupled)));
    HALFBYTE_UNROLL
    for (int j = 0; j < states; ++j) after[j] = before[j] = load_part<V>(state[j] + i, size);
    u = rule<V, optimizer>(update.c, g, after);
  }
};

template <class V, Optimizer optimizer, class T>
HALFBYTE_INLINE void add_norms(const Update& update, const T* param, const T* grad, float* const* state,
                               int64_t count, Norms* norms) {
  for (int64_t i = 0; i < count; i += V::W) {
    const Moving<V, optimizer, T> x(update, param, grad, state, i, min64(V::W, count - i));
    norms->param += sum_of_squares<V>(x.p);
    // Where elements are missing, 0 / (0 + eps) may be not a number, which does not count either.
    norms->update += sum_of_squares<V>(x.u);
  }
}

// Moves `count` parameters (at most kMostBlock) from flat position `first`, and their states in place; with k8
// also gives the largest magnitude of each new state.
template <class V, Optimizer optimizer, bool k8, class T>
HALFBYTE_INLINE void move(const Update& update, const UpdateTensor& t, float size, T* param, const T* grad,
                          float* const* state, int64_t first, int64_t count, float* most) {
  using F = typename V::F;
  constexpr int states = Kept<optimizer>::all;
  float exact[kMostBlock];
  F largest[states];
  HALFBYTE_UNROLL
  for (int j = 0; j < states; ++j) largest[j] = V::set1(0.0f);
  for (int64_t i = 0; i < count; i += V::W) {
    const int64_t part = min64(V::W, count - i);
    Moving<V, optimizer, T> x(update, param, grad, state, i, part);
    F moved = V::sub(V::mul(x.p, V::set1(update.c.decay)), V::mul(x.u, V::set1(size)));
    if constexpr (k8) {
      uint32_t finite = V::mask_finite(x.u);
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) finite &= V::mask_finite(x.after[j]);
      moved = V::where(finite, x.p, moved);
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) x.after[j] = V::zero_where(~finite, x.after[j]);
    }
    if (update.skip_zeros) {
      const uint32_t zero = V::mask_zero(x.scaled);
      moved = V::where(zero, moved, x.p);
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) x.after[j] = V::where(zero, x.after[j], x.before[j]);
    }
    HALFBYTE_UNROLL
    for (int j = 0; j < states; ++j) {
      if constexpr (k8) largest[j] = V::max_keep(largest[j], V::abs(x.after[j]));
      store_part<V>(state[j] + i, part, x.after[j]);
    }
    if (update.stochastic) {
      V::store(exact + i, moved);
    } else {
      store_part<V>(param + i, part, moved);
    }
  }
  if (update.stochastic) store_stochastic(param, exact, count, first, t.key);
  if constexpr (k8) {
    for (int j = 0; j < states; ++j) most[j] = V::hmax(largest[j]);
  }
}

// The codes of one state: where they are, what they mean, how they are made.
struct Codes {
  uint8_t* codes;
  float* absmax;
  const float* codebook;
  const Encoder8* encoder;
  int negative;  // levels below zero
};

template <class V>
HALFBYTE_INLINE void encode_state(const Codes& c, const float* state, float most, int64_t first,
                                  int64_t count, int64_t blocksize) {
  write(c.absmax + first / blocksize, most);
  if (most == 0.0f) {
    memset(c.codes + first, search8(0.0f, c.encoder->thresholds), static_cast<size_t>(count));
    return;
  }
  const typename V::F largest = V::set1(most);
  for (int64_t i = 0; i < count; i += V::W) {
    const int64_t part = min64(V::W, count - i);
    const typename V::F s = load_part<V>(state + i, part);
    typename V::I codes = encode<V>(*c.encoder, V::div(s, largest));
    if (c.negative > 0) codes = V::nudge(codes, s, c.negative);
    uint8_t bytes[V::W];
    V::store_bytes(part < V::W ? bytes : c.codes + first + i, codes);
    if (part < V::W) memcpy(c.codes + first + i, bytes, static_cast<size_t>(part));
  }
}

inline int levels_below_zero(const float* codebook) {
  int count = 0;
  for (int i = 0; i < 256; ++i) count += static_cast<int>(as_bits(read<float>(codebook + i)) >> 31);
  return count;
}

// What all chunks of one call share.
struct Plan {
  const Update& update;
  const Encoder8* encoders;  // of codebook1 and codebook2
  int negative[2];
  int64_t chunk;
  const int64_t* starts;  // number of each tensor's first chunk, and of all chunks
};

// One chunk of one tensor: norms where `norms` is given, the step otherwise.
template <class V, Optimizer optimizer, bool k8, class T>
HALFBYTE_ALONE void update_chunk(const Plan& plan, const UpdateTensor& t, float size, int64_t begin,
                                 Norms* norms) {
  constexpr int firsts = Kept<optimizer>::first, states = Kept<optimizer>::all;
  const Update& update = plan.update;
  const int64_t end = min64(t.count, begin + plan.chunk), step = k8 ? update.blocksize : kMostBlock;
  float decoded[k8 ? states : 1][kMostBlock], most[states];
  float* state[states];
  Codes codes[states];
  typename V::Book books[2];
  if constexpr (k8) {
    books[0] = V::book(update.codebook1);
    if (states > firsts) books[1] = V::book(update.codebook2);
    for (int j = 0; j < states; ++j) {
      const bool second = j >= firsts;
      uint8_t* base = static_cast<uint8_t*>(second ? t.state2 : t.state1);
      codes[j] = {j == 1 && !second ? base + t.count : base,
                  second ? t.absmax2 : (j == 1 ? t.slow : t.absmax1), nullptr, plan.encoders + second,
                  plan.negative[second]};
      state[j] = decoded[j];
    }
  }
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = min64(step, end - first);
    T* param = static_cast<T*>(t.param) + first;
    const T* grad = static_cast<const T*>(t.grad) + first;
    for (int j = 0; j < states; ++j) {
      if constexpr (k8) {
        const float scale = read<float>(codes[j].absmax + first / step);
        decode8<V, false>(books[j >= firsts], codes[j].codes + first, scale, count, decoded[j]);
      } else {
        float* base = static_cast<float*>(j >= firsts ? t.state2 : t.state1);
        state[j] = base + first + (j == 1 && j < firsts ? t.count : 0);
      }
    }
    if (norms != nullptr) {
      add_norms<V, optimizer>(update, param, grad, state, count, norms);
      continue;
    }
    move<V, optimizer, k8>(update, t, size, param, grad, state, first, count, most);
    if constexpr (k8) {
      for (int j = 0; j < states; ++j) encode_state<V>(codes[j], decoded[j], most[j], first, count, step);
    }
  }
}

// How far a tensor may go, see trust_factor in ops/rules.py.
inline float trust_factor(const Update& u, const Norms& sums) {
  const double param = __builtin_sqrt(sums.param), update = __builtin_sqrt(sums.update) * u.c.norm;
  if (param == 0.0 || update == 0.0) return 1.0f;
  const double r = (u.trust * param + u.trust_eps) / update;
  return static_cast<float>(r < 1.0 ? r : 1.0);
}

template <class V, Optimizer optimizer, bool k8, class T>
const char* update_all(const Plan& plan, int threads) {
  const Update& update = plan.update;
  const int64_t chunks = plan.starts[update.size];
  const int workers = team(threads, chunks * plan.chunk, kUpdateChunk / 2);
  const auto each = [&](const auto& f) {
    parallel_for(workers, chunks, [&](int64_t c) {
      int64_t low = 0, high = update.size;  // the tensor whose chunks begin at or before c
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (plan.starts[middle] <= c ? low : high) = middle;
      }
      f(c, low, (c - plan.starts[low]) * plan.chunk);
    });
  };
  Norms* sums = nullptr;
  if (update.trust > 0.0) {
    sums = static_cast<Norms*>(scratch(slot_sums, static_cast<size_t>(chunks + update.size) * sizeof(Norms)));
    if (sums == nullptr) return no_memory;
    each([&](int64_t c, int64_t tensor, int64_t begin) {
      sums[c] = {0.0, 0.0};
      update_chunk<V, optimizer, k8, T>(plan, update.tensors[tensor], 0.0f, begin, sums + c);
    });
    for (int64_t tensor = 0; tensor < update.size; ++tensor) {
      Norms total = {0.0, 0.0};
      for (int64_t c = plan.starts[tensor]; c < plan.starts[tensor + 1]; ++c) {
        total.param += sums[c].param;
        total.update += sums[c].update;
      }
      sums[chunks + tensor] = total;
    }
  }
  each([&](int64_t, int64_t tensor, int64_t begin) {
    const float size =
        sums == nullptr ? update.c.size : trust_factor(update, sums[chunks + tensor]) * update.c.size;
    update_chunk<V, optimizer, k8, T>(plan, update.tensors[tensor], size, begin, nullptr);
  });
  return nullptr;
}

template <class V, bool k8, class T>
const char* update_by_name(const Plan& plan, int threads) {
  switch (plan.update.optimizer) {
    case Optimizer::adam:
      return update_all<V, Optimizer::adam, k8, T>(plan, threads);
    case Optimizer::ademamix:
      return update_all<V, Optimizer::ademamix, k8, T>(plan, threads);
    case Optimizer::lion:
      return update_all<V, Optimizer::lion, k8, T>(plan, threads);
    case Optimizer::momentum:
      return update_all<V, Optimizer::momentum, k8, T>(plan, threads);
    case Optimizer::rmsprop:
      return update_all<V, Optimizer::rmsprop, k8, T>(plan, threads);
    case Optimizer::adagrad:
      return update_all<V, Optimizer::adagrad, k8, T>(plan, threads);
  }
  return "unknown optimizer";
}

template <class V, bool k8>
const char* update_tensors(const Update& update, int threads) {
  if (k8 && (update.blocksize < 1 || update.blocksize > kMostBlock)) return "blocksize must be 1 to 4096";
  int64_t* starts =
      static_cast<int64_t*>(scratch(slot_extra, static_cast<size_t>(update.size + 1) * sizeof(int64_t)));
  if (starts == nullptr) return no_memory;
  const int64_t unit = k8 ? update.blocksize : kMostBlock;
  const int64_t chunk = max64(1, kUpdateChunk / unit) * unit;
  int64_t total = 0;
  starts[0] = 0;
  for (int64_t i = 0; i < update.size; ++i) {
    starts[i + 1] = starts[i] + ceil_div(update.tensors[i].count, chunk);
    total += update.tensors[i].count;
  }
  Encoder8 encoders[2];
  Plan plan = {update, encoders, {0, 0}, chunk, starts};
  if (k8) {
    const float* const codebooks[] = {update.codebook1, update.codebook2};
    for (int i = 0; i < 2; ++i) {
      if (codebooks[i] == nullptr) continue;
      const Slot slot = i == 0 ? slot_codes : slot_codes2;
      if (const char* error = encoder8(slot, codebooks[i], total, encoders + i)) return error;
      plan.negative[i] = levels_below_zero(codebooks[i]);
    }
  }
  return with_dtype(update.dtype, [&](auto* type) -> const char* {
    using T = typename Pointed<decltype(type)>::Type;
    return update_by_name<V, k8, T>(plan, threads);
  });
}

template <class V>
const char* update_32bit(const Update& update, int threads) {
  return update_tensors<V, false>(update, threads);
}

template <class V>
const char* update_8bit(const Update& update, int threads) {
  return update_tensors<V, true>(update, threads);
}

}  // namespace
}  // namespace halfbyte::cpu
