// int8.h: LLM.int8(): rows of x -> int8 and their maxima, the integer product, the linear layer, and back.
//
// Work      quantization: threads take rows.  Products: dot.h's register blocks; the integer one reads the
//           weight as it lies, without tiles or a second copy.
// Bound by  memory for few rows of x, the integer multipliers above.
// Agrees    bit for bit with the reference for everything but linear_int8, whose fp32 sums round in another
//           order where there are outliers and in mode w8a16.
// D         an integer dot of dot.h with prepare(q, k, padded, out) -> correction, see DotInt8.
#pragma once
#include "dot.h"
#include "linear4.h"

namespace halfbyte::cpu {
namespace {

inline constexpr float kPer127 = 7.874015718698502e-3f;
inline constexpr float kPer127Squared = 6.200012e-05f;

// ---- quantize_int8_rows

// The row's maximum without outliers, whose columns are marked.
template <class V, class T>
HALFBYTE_INLINE float row_absmax(const T* x, int64_t k, float threshold, uint8_t* outlier_columns) {
  if (!(threshold > 0.0f)) return block_absmax<V>(x, k);
  const typename V::F limit = V::set1(threshold);
  typename V::F m = V::set1(0.0f);
  for (int64_t i = 0; i < k; i += V::W) {
    typename V::F a = V::abs(load_part<V>(x + i, k - i));
    const uint32_t hits = V::mask_ge(a, limit);
    if (__builtin_expect(hits != 0, 0)) {
      a = V::zero_where(hits, a);
      for (uint32_t rest = hits; rest != 0; rest &= rest - 1) {
        // Several rows may mark one column.
        __atomic_store_n(outlier_columns + i + __builtin_ctz(rest), uint8_t{1}, __ATOMIC_RELAXED);
      }
    }
    m = V::max_keep(m, a);
  }
  return V::hmax(m);
}

template <class V, class T>
HALFBYTE_INLINE void quantize_row(const T* x, int64_t k, float absmax, int8_t* q) {
  const typename V::F scale = V::set1(absmax > 0.0f ? 127.0f / absmax : 0.0f);
  for (int64_t i = 0; i < k; i += V::W) {
    const typename V::I codes = V::to_int8(V::mul(load_part<V>(x + i, k - i), scale));
    uint8_t* to = reinterpret_cast<uint8_t*>(q + i);
    if (i + V::W <= k) {
      V::store_bytes(to, codes);
    } else {
      uint8_t bytes[V::W];
      V::store_bytes(bytes, codes);
      memcpy(to, bytes, static_cast<size_t>(k - i));
    }
  }
}

template <class V, class T>
void quantize_rows(const T* x, int64_t rows, int64_t k, float threshold, int8_t* q, float* absmax,
                   uint8_t* outlier_columns, int threads) {
  const int workers = team(threads, rows * k, kChunk / 2);
  if (k != 0) memset(outlier_columns, 0, static_cast<size_t>(k));  // else it may be nullptr
  const int64_t at_once = max64(1, kChunk / max64(1, k)), chunks = ceil_div(rows, at_once);
  parallel_for(workers, chunks, [=](int64_t c) {
    for (int64_t r = c * at_once; r < min64(rows, (c + 1) * at_once); ++r) {
      const float largest = row_absmax<V>(x + r * k, k, threshold, outlier_columns);
      write(absmax + r, largest);
      quantize_row<V>(x + r * k, k, largest, q + r * k);
    }
  });
  if (k == 0 || !(threshold > 0.0f) || memchr(outlier_columns, 1, static_cast<size_t>(k)) == nullptr) return;
  parallel_for(workers, chunks, [=](int64_t c) {
    for (int64_t r = c * at_once; r < min64(rows, (c + 1) * at_once); ++r) {
      for (int64_t i = 0; i < k; ++i) q[r * k + i] = outlier_columns[i] != 0 ? int8_t{0} : q[r * k + i];
    }
  });
}

template <class V>
const char* quantize_int8_rows(const void* x, DType dtype, int64_t rows, int64_t k, float threshold,
                               int8_t* q, float* absmax, uint8_t* outlier_columns, int threads) {
  expect_writes(q, static_cast<size_t>(rows * k));
  return with_dtype(dtype, [=](auto* type) -> const char* {
    quantize_rows<V>(static_cast<decltype(type)>(const_cast<void*>(x)), rows, k, threshold, q, absmax,
                     outlier_columns, threads);
    return nullptr;
  });
}

// ---- dequantize_int8

// One row: (q * scale) * constant + bias, with scale = row or row * columns[j].
template <class V, class Q, class T>
HALFBYTE_INLINE void scale_row(const Q* q, float row, const float* columns, const float* bias, int64_t n,
                               T* out) {
  const typename V::F scale = V::set1(row), constant = V::set1(columns != nullptr ? kPer127Squared : kPer127);
  for (int64_t j = 0; j < n; j += V::W) {
    const int64_t size = min64(V::W, n - j);
    const bool whole = size == V::W;
    Q part[V::W] = {};
    if (!whole) memcpy(part, q + j, static_cast<size_t>(size) * sizeof(Q));
    const typename V::F s = columns != nullptr ? V::mul(scale, load_part<V>(columns + j, size)) : scale;
    typename V::F v = V::mul(V::mul(V::from_int(whole ? q + j : part), s), constant);
    if (bias != nullptr) v = V::add(v, load_part<V>(bias + j, size));
    if (whole) {
      V::store(out + j, v);
    } else {
      T values[V::W];
      V::store(values, v);
      memcpy(out + j, values, static_cast<size_t>(size) * sizeof(T));
    }
  }
}

template <class V>
const char* dequantize_int8(const void* q, bool wide, const float* row_absmax, const float* col_absmax,
                            const float* bias, void* out, DType dtype, int64_t rows, int64_t n, int threads) {
  return with_dtype(dtype, [=](auto* type) -> const char* {
    auto* to = static_cast<decltype(type)>(out);
    expect_writes(out, static_cast<size_t>(rows * n) * sizeof(*to));
    const int64_t at_once = max64(1, kChunk / max64(1, n));
    parallel_for(team(threads, rows * n, kChunk / 2), ceil_div(rows, at_once), [=](int64_t c) {
      for (int64_t r = c * at_once; r < min64(rows, (c + 1) * at_once); ++r) {
        const float row = read<float>(row_absmax + r);
        if (wide) {
          scale_row<V>(static_cast<const int32_t*>(q) + r * n, row, col_absmax, bias, n, to + r * n);
        } else {
          scale_row<V>(static_cast<const int8_t*>(q) + r * n, row, col_absmax, bias, n, to + r * n);
        }
      }
    });
    return nullptr;
  });
}

// ---- the integer product

inline constexpr int64_t kFew = 4, kRowsAtOnce = 32;

// Few rows of a: the weight is read as it lies and added to sums.
template <class D>
HALFBYTE_INLINE void int8_rows(const typename D::A* panel, int64_t lda, int64_t m, const int8_t* b,
                               int64_t row, int64_t rows, int64_t k, typename D::Sum* sums, int64_t ld) {
  const int64_t whole = k / D::kStep * D::kStep;
  for (int64_t j = 0; j < rows; j += 4) {
    const int8_t* from[4];
    for (int64_t p = 0; p < 4; ++p) from[p] = b + (row + min64(j + p, rows - 1)) * k;
    if (j + 4 < rows) {
      for (int64_t p = 0; p < 4; ++p) __builtin_prefetch(from[p] + 4 * k);
    }
    for (int64_t i = 0; i < m; i += D::kRows) {
      dot_rows<D>(panel + i * lda, lda, min64(D::kRows, m - i), from, whole, sums + i * ld + j, ld);
    }
    if (whole < k) {
      int8_t rest[4][D::kStep] = {};
      const int8_t* ends[4] = {rest[0], rest[1], rest[2], rest[3]};
      for (int64_t p = 0; p < 4; ++p) memcpy(rest[p], from[p] + whole, static_cast<size_t>(k - whole));
      for (int64_t i = 0; i < m; i += D::kRows) {
        dot_rows<D>(panel + i * lda + whole, lda, min64(D::kRows, m - i), ends, D::kStep, sums + i * ld + j,
                    ld);
      }
    }
  }
}

// out(row of a, first row of b, count, sums) receives the exact sums of up to kTileRows rows of b.
template <class D, class Out>
const char* int8_product(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k, int threads,
                         const Out& out) {
  using A = typename D::A;
  using Tile = typename D::Tile;

  const int64_t depth = round_up(k, D::kStep), lda = padded<A>(depth);
  const int64_t at_once = panel_rows(m, lda * static_cast<int64_t>(sizeof(A)));
  A* panel = static_cast<A*>(scratch(slot_panel, static_cast<size_t>(at_once * lda) * sizeof(A)));
  int32_t* correction =
      static_cast<int32_t*>(scratch(slot_extra, static_cast<size_t>(at_once) * sizeof(int32_t)));
  if (panel == nullptr || correction == nullptr) return no_memory;
  const int workers = team(threads, n * k, int64_t{1} << 15);
  int failed = 0;
  for (int64_t m0 = 0; m0 < m; m0 += at_once) {
    const int64_t rows_of_a = min64(at_once, m - m0);
    parallel_for(team(threads, rows_of_a * k, int64_t{1} << 17), rows_of_a,
                 [=](int64_t i) { correction[i] = D::prepare(a + (m0 + i) * k, k, depth, panel + i * lda); });
    if (rows_of_a <= kFew) {
      parallel_for(workers, ceil_div(n, kRowsAtOnce), [&, m0, rows_of_a](int64_t t) {
        const int64_t row = t * kRowsAtOnce, rows = min64(kRowsAtOnce, n - row);
        int32_t* sums = static_cast<int32_t*>(
            scratch(slot_sums, static_cast<size_t>(kFew * kRowsAtOnce) * sizeof(int32_t)));
        if (sums == nullptr) {
          __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
          return;
        }
        for (int64_t i = 0; i < rows_of_a; ++i) {
          for (int64_t j = 0; j < kRowsAtOnce; ++j) sums[i * kRowsAtOnce + j] = correction[i];
        }
        int8_rows<D>(panel, lda, rows_of_a, b, row, rows, k, sums, kRowsAtOnce);
        for (int64_t i = 0; i < rows_of_a; ++i) out(m0 + i, row, rows, sums + i * kRowsAtOnce);
      });
      if (failed != 0) return no_memory;
      continue;
    }
    const auto decode = [=](typename Tile::B* tile, int64_t ld, int64_t row, int64_t rows, int64_t k0,
                            int64_t size) {
      for (int64_t r = 0; r < rows; ++r) {
        Tile::copy_row(b + (row + r) * k + k0, min64(size, k - k0), 4 * k, tile + r * ld, size);
      }
    };
    const auto finish = [=](int64_t row, int64_t rows, int32_t* sums, int64_t ld) {
      for (int64_t i = 0; i < rows_of_a; ++i) {
        for (int64_t j = 0; j < rows; ++j) {
          sums[i * ld + j] = static_cast<int32_t>(static_cast<uint32_t>(sums[i * ld + j]) +
                                                  static_cast<uint32_t>(correction[i]));
        }
        out(m0 + i, row, rows, sums + i * ld);
      }
    };
    const char* error = dot_tiles<Tile>(panel, lda, rows_of_a, n, depth, workers, decode, finish);
    if (error != nullptr) return error;
  }
  return nullptr;
}

template <class D>
const char* matmul_int8(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k, int32_t* out,
                        int threads) {
  return int8_product<D>(a, b, m, n, k, threads,
                         [=](int64_t i, int64_t row, int64_t rows, const int32_t* sums) {
                           memcpy(out + i * n + row, sums, static_cast<size_t>(rows) * sizeof(int32_t));
                         });
}

// ---- linear_int8

// Weight rows as floats, columns k0 .. k0 + size - 1, padded with zeros.
template <class V>
HALFBYTE_INLINE void widen_row(const int8_t* q, int64_t count, float* out, int64_t size) {
  int64_t i = 0;
  for (; i + V::W <= count; i += V::W) V::store(out + i, V::from_int(q + i));
  for (; i < size; ++i) out[i] = i < count ? static_cast<float>(q[i]) : 0.0f;
}

// Straight from the weight.
template <class V>
struct DotW8 : DotF32<V> {
  using B = int8_t;
  static HALFBYTE_INLINE typename V::F load_b(const int8_t* p) { return V::from_int(p); }
};

// x as it is, the weight's scale applied to the sums.
template <class V, class T>
const char* linear_w8a16(const T* x, const int8_t* weight, const float* weight_absmax, const T* bias,
                         int64_t m, int64_t n, int64_t k, T* y, int threads) {
  using D = DotF32<V>;
  const int64_t depth = round_up(k, V::W), lda = padded<float>(depth);
  const int64_t at_once = panel_rows(m, lda * static_cast<int64_t>(sizeof(float)));
  float* panel = static_cast<float*>(scratch(slot_panel, static_cast<size_t>(at_once * lda) * sizeof(float)));
  if (panel == nullptr) return no_memory;
  for (int64_t m0 = 0; m0 < m; m0 += at_once) {
    const int64_t rows_of_x = min64(at_once, m - m0);
    parallel_for(team(threads, rows_of_x * k, int64_t{1} << 16), rows_of_x, [=](int64_t i) {
      for (int64_t p = 0; p < depth; p += V::W) {
        V::store(panel + i * lda + p, load_part<V>(x + (m0 + i) * k + p, k - p));
      }
    });
    const auto decode = [=](float* tile, int64_t ld, int64_t row, int64_t rows, int64_t k0, int64_t size) {
      for (int64_t r = 0; r < rows; ++r)
        widen_row<V>(weight + (row + r) * k + k0, min64(size, k - k0), tile + r * ld, size);
    };
    const auto finish = [=](int64_t row, int64_t rows, float* sums, int64_t ld) {
      for (int64_t i = 0; i < rows_of_x; ++i) {
        for (int64_t j = 0; j < rows; ++j) sums[i * ld + j] *= read<float>(weight_absmax + row + j) * kPer127;
        finish_row<V>(sums + i * ld, bias == nullptr ? nullptr : bias + row, rows, y + (m0 + i) * n + row);
      }
    };
    const int workers = team(threads, n * k, int64_t{1} << 15);
    if (rows_of_x <= kFew) {
      parallel_for(workers, ceil_div(n, kRowsAtOnce), [=](int64_t t) {
        const int64_t row = t * kRowsAtOnce, rows = min64(kRowsAtOnce, n - row);
        float sums[kFew * kRowsAtOnce + kRowsAtOnce] = {};
        int8_rows<DotW8<V>>(panel, lda, rows_of_x, weight, row, rows, k, sums, kRowsAtOnce);
        finish(row, rows, sums, kRowsAtOnce);
      });
      continue;
    }
    const char* error = dot_tiles<D>(panel, lda, rows_of_x, n, depth, workers, decode, finish);
    if (error != nullptr) return error;
  }
  return nullptr;
}

// The outlier columns' part, in fp32: y += x[:, columns] * weight[:, columns]^T, rounded with the rest.
template <class V, class T>
const char* add_outliers(const T* x, const int8_t* weight, const float* weight_absmax, const int64_t* columns,
                         int64_t count, int64_t m, int64_t n, int64_t k, float* y, int threads) {
  using D = DotF32<V>;
  const int64_t depth = round_up(count, V::W), lda = padded<float>(depth);
  const int64_t at_once = panel_rows(m, lda * static_cast<int64_t>(sizeof(float)));
  float* panel = static_cast<float*>(scratch(slot_panel, static_cast<size_t>(at_once * lda) * sizeof(float)));
  if (panel == nullptr) return no_memory;
  for (int64_t m0 = 0; m0 < m; m0 += at_once) {
    const int64_t rows_of_x = min64(at_once, m - m0);
    for (int64_t i = 0; i < rows_of_x; ++i) {
      for (int64_t p = 0; p < depth; ++p) {
        T one[V::W] = {};
        float wide[V::W];
        if (p < count) one[0] = read<T>(x + (m0 + i) * k + columns[p]);
        V::store(wide, V::load(one));
        panel[i * lda + p] = wide[0];
      }
    }
    const auto decode = [=](float* tile, int64_t ld, int64_t row, int64_t rows, int64_t k0, int64_t size) {
      for (int64_t r = 0; r < rows; ++r) {
        const int8_t* from = weight + (row + r) * k;
        for (int64_t p = 0; p < size; ++p) {
          tile[r * ld + p] = k0 + p < count ? static_cast<float>(from[columns[k0 + p]]) : 0.0f;
        }
      }
    };
    const auto finish = [=](int64_t row, int64_t rows, const float* sums, int64_t ld) {
      for (int64_t i = 0; i < rows_of_x; ++i) {
        float* to = y + (m0 + i) * n + row;
        for (int64_t j = 0; j < rows; ++j)
          to[j] += sums[i * ld + j] * (read<float>(weight_absmax + row + j) * kPer127);
      }
    };
    const char* error = dot_tiles<D>(panel, lda, rows_of_x, n, depth,
                                     team(threads, n * depth, int64_t{1} << 13), decode, finish);
    if (error != nullptr) return error;
  }
  return nullptr;
}

template <class V, class D, class T>
const char* linear_exact(const T* x, const int8_t* weight, const float* weight_absmax, const T* bias,
                         float threshold, int64_t m, int64_t n, int64_t k, T* y, int threads) {
  // One buffer: int8 rows, their maxima, the mask of columns and its indices.
  const int64_t q_bytes = round_up(m * k, 64), absmax_bytes = round_up(4 * m, 64),
                mask_bytes = round_up(k, 64);
  const int64_t n_bytes = round_up(4 * n, 64);
  char* buffer = static_cast<char*>(
      scratch(slot_codes, static_cast<size_t>(q_bytes + absmax_bytes + mask_bytes + 8 * k + n_bytes)));
  if (buffer == nullptr) return no_memory;
  int8_t* q = reinterpret_cast<int8_t*>(buffer);
  float* absmax = reinterpret_cast<float*>(buffer + q_bytes);
  uint8_t* mask = reinterpret_cast<uint8_t*>(buffer + q_bytes + absmax_bytes);
  int64_t* columns = reinterpret_cast<int64_t*>(buffer + q_bytes + absmax_bytes + mask_bytes);
  float* wide_bias = nullptr;
  if (bias != nullptr) {
    wide_bias = reinterpret_cast<float*>(buffer + q_bytes + absmax_bytes + mask_bytes + 8 * k);
    for (int64_t j = 0; j < n; j += V::W) {
      float wide[V::W];
      V::store(wide, load_part<V>(bias + j, n - j));
      memcpy(wide_bias + j, wide, static_cast<size_t>(min64(V::W, n - j)) * sizeof(float));
    }
  }
  quantize_rows<V>(x, m, k, threshold, q, absmax, mask, threads);
  int64_t count = 0;
  if (threshold > 0.0f) {
    for (int64_t i = 0; i < k; ++i) {
      columns[count] = i;
      count += mask[i] != 0;
    }
  }
  if (count == 0) {
    return int8_product<D>(
        q, weight, m, n, k, threads, [=](int64_t i, int64_t row, int64_t rows, const int32_t* sums) {
          scale_row<V>(sums, absmax[i], weight_absmax + row, wide_bias == nullptr ? nullptr : wide_bias + row,
                       rows, y + i * n + row);
        });
  }
  float* sums_of_y = static_cast<float*>(scratch(slot_absmax, static_cast<size_t>(m * n) * sizeof(float)));
  if (sums_of_y == nullptr) return no_memory;
  const char* error = int8_product<D>(
      q, weight, m, n, k, threads, [=](int64_t i, int64_t row, int64_t rows, const int32_t* sums) {
        scale_row<V>(sums, absmax[i], weight_absmax + row, nullptr, rows, sums_of_y + i * n + row);
      });
  if (error == nullptr) {
    error = add_outliers<V>(x, weight, weight_absmax, columns, count, m, n, k, sums_of_y, threads);
  }
  if (error != nullptr) return error;
  parallel_for(team(threads, m * n, kChunk), m,
               [=](int64_t i) { finish_row<V>(sums_of_y + i * n, bias, n, y + i * n); });
  return nullptr;
}

template <class V, class D>
const char* linear_int8(const void* x, DType dtype, const int8_t* weight, const float* weight_absmax,
                        const void* bias, float threshold, bool exact, int64_t m, int64_t n, int64_t k,
                        void* y, int threads) {
  return with_dtype(dtype, [=](auto* type) -> const char* {
    using Pointer = decltype(type);
    const Pointer from = static_cast<Pointer>(const_cast<void*>(x)), to = static_cast<Pointer>(y);
    const Pointer add = static_cast<Pointer>(const_cast<void*>(bias));
    return exact ? linear_exact<V, D>(from, weight, weight_absmax, add, threshold, m, n, k, to, threads)
                 : linear_w8a16<V>(from, weight, weight_absmax, add, m, n, k, to, threads);
  });
}

}  // namespace
}  // namespace halfbyte::cpu
