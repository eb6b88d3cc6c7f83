// trust.cu: how far each tensor may step where max_unorm bounds norm(update) / norm(parameter).
//
// Work      One pass over all chunks adds up the squares of what is finite, in fp64 and in one order: lanes, then
//           groups, then, in a second kernel with a thread block per tensor, chunks.  The result is the same in
//           every run.
// Bound by  memory, and on a device with few fp64 units by them.
// Agrees    with trust_factor in ops/rules.py up to the order of the sums.
#include "optimizer.cuh"

namespace halfbyte::gpu {
namespace {

struct Sums {
  double param, update;
};

HALFBYTE_DEVICE Sums added_up(Sums sums) {
  __shared__ Sums of_group[kGroups];
  for (int mask = kGroup / 2; mask > 0; mask /= 2) {
    sums.param += HALFBYTE_SHFL_XOR(sums.param, mask);
    sums.update += HALFBYTE_SHFL_XOR(sums.update, mask);
  }
  __syncthreads();  // those of the round before have been read
  if (threadIdx.x % kGroup == 0) of_group[threadIdx.x / kGroup] = sums;
  __syncthreads();
  Sums all = {0.0, 0.0};
  for (int i = 0; i < kGroups; ++i) {
    all.param += of_group[i].param;
    all.update += of_group[i].update;
  }
  return all;
}

HALFBYTE_DEVICE double square(float x) {
  const double wide = finite(x) ? static_cast<double>(x) : 0.0;
  return wide * wide;
}

template <Optimizer kRule, class T, bool k8>
__global__ void __launch_bounds__(kUpdateThreads) sums_kernel(const Update update, Sums* partial) {
  constexpr int states = Kept<kRule>::all;
  using B = std::conditional_t<k8, Books<(Kept<kRule>::second > 0)>, NoCodes>;
  __shared__ B books;
  if constexpr (k8) books.fill(update.codebook1, update.codebook2);
  const Coefficients c = coefficients_of(update);
  for (int64_t chunk = blockIdx.x; chunk < update.chunks; chunk += gridDim.x) {
    const Spot spot(update, static_cast<uint32_t>(chunk), update.chunk[chunk]);
    Sums sums = {0.0, 0.0};
    if (spot.first() < spot.t.count) {
      Piece<kRule, T, k8> piece;
      piece.read(spot);
      float p[kEach], g[kEach], u[kEach], s[states][kEach];
      piece.widen_param(p);
      piece.widen_grad(g, c.scale);
      HALFBYTE_UNROLL
      for (int j = 0; j < states; ++j) piece.widen_state(j, books, s[j]);
      apply_all<kRule, T>(c, p, g, s, u);
      HALFBYTE_UNROLL
      for (int e = 0; e < kEach; ++e) {
        if (!spot.whole && !Piece<kRule, T, k8>::has(spot, e)) continue;
        sums.param += square(p[e]);
        sums.update += square(u[e]);
      }
    }
    const Sums all = added_up(sums);
    if (threadIdx.x == 0) partial[chunk] = all;
  }
}

__global__ void __launch_bounds__(kUpdateThreads)
    sizes_kernel(const Update update, double max_unorm, double eps, const Sums* partial, float* sizes) {
  const Coefficients c = coefficients_of(update);
  for (int64_t number = blockIdx.x; number < update.tensors; number += gridDim.x) {
    const UpdateTensor& t = update.tensor[number];
    const int64_t end = t.first + (t.count + kUpdateChunk - 1) / kUpdateChunk;
    Sums sums = {0.0, 0.0};
    for (int64_t chunk = t.first + threadIdx.x; chunk < end; chunk += kUpdateThreads) {
      sums.param += partial[chunk].param;
      sums.update += partial[chunk].update;
    }
    sums = added_up(sums);
    if (threadIdx.x != 0) continue;
    const double param = sqrt(sums.param), moved = sqrt(sums.update) * static_cast<double>(c.norm);
    double factor = param == 0.0 || moved == 0.0 ? 1.0 : (max_unorm * param + eps) / moved;
    if (factor > 1.0) factor = 1.0;
    sizes[number] = static_cast<float>(factor) * c.size;
  }
}

template <Optimizer kRule, class T>
const char* launch(const Update& update, bool quantized, double max_unorm, double eps, Sums* partial,
                   float* sizes, void* stream) {
  if constexpr (kRule == Optimizer::adam || kRule == Optimizer::momentum || kRule == Optimizer::rmsprop) {
    const unsigned grid = grid_for(update.chunks, 4);
    if (quantized) {
      HALFBYTE_LAUNCH((sums_kernel<kRule, T, true>), grid, update_threads(), 0, stream, update, partial);
    } else {
      HALFBYTE_LAUNCH((sums_kernel<kRule, T, false>), grid, update_threads(), 0, stream, update, partial);
    }
    if (const char* error = launched()) return error;
    HALFBYTE_LAUNCH((sizes_kernel), grid_for(update.tensors, 8), update_threads(), 0, stream, update,
                    max_unorm, eps, partial, sizes);
    return launched();
  }
  return "this optimizer has no trust factor";
}

}  // namespace

const char* update_trust(const Update& update, bool quantized, double max_unorm, double eps, double* partial,
                         float* sizes, void* stream) {
  return with_rule(update.optimizer, [&](auto rule) {
    return with_dtype(update.dtype, [&](auto type) {
      return launch<rule.value, decltype(type)>(update, quantized, max_unorm, eps,
                                                reinterpret_cast<Sums*>(partial), sizes, stream);
    });
  });
}

}  // namespace halfbyte::gpu
