// update32.cu: one step of an optimizer with fp32 states over all tensors of a plan, in place.
//
// In, out   parameters and gradients fp32, fp16 or bf16; states fp32.
// Work      as in update8.cu, but no element needs to know another: a lane has two runs of four.
// Bound by  memory: 22 bytes per bf16 parameter of Adam, 28 per fp32 one.
// Agrees    states bit for bit with the reference; see optimizer.cuh.
#include "optimizer.cuh"

namespace halfbyte::gpu {
namespace {

template <Optimizer kRule, class T>
HALFBYTE_DEVICE void step(const Update& update, const Coefficients& c, const Spot& spot, float size,
                          Piece<kRule, T, false>& piece) {
  constexpr int states = Kept<kRule>::all;
  using L = Lanes8<T, false>;
  float p[kEach], g[kEach], u[kEach], s[states][kEach];
  piece.widen_param(p);
  piece.widen_grad(g, c.scale);
  HALFBYTE_UNROLL
  for (int j = 0; j < states; ++j) piece.widen_state(j, NoCodes(), s[j]);
  apply_all<kRule, T>(c, p, g, s, u);
  HALFBYTE_UNROLL
  for (int i = 0; i < kEach; ++i) u[i] = p[i] * c.decay - u[i] * size;
  if (update.skip_zeros) {
    HALFBYTE_UNROLL
    for (int i = 0; i < kEach; ++i) u[i] = g[i] == 0.0f ? p[i] : u[i];
    HALFBYTE_UNROLL
    for (int j = 0; j < states; ++j) {
      HALFBYTE_UNROLL
      for (int i = 0; i < kEach; ++i)
        s[j][i] = g[i] == 0.0f ? as_float(piece.state[j][i / 4].w[i % 4]) : s[j][i];
    }
  }
  piece.narrow_param(spot, update.stochastic, c.drawn, u);
  HALFBYTE_UNROLL
  for (int j = 0; j < states; ++j) {
    HALFBYTE_UNROLL
    for (int r = 0; r < L::runs; ++r) piece.state[j][r] = narrow_run<float, L::run>(s[j] + r * L::run);
  }
  piece.write(spot);
}

template <Optimizer kRule, class T>
__global__ void __launch_bounds__(kUpdateThreads) update_32bit_kernel(const Update update) {
  const Coefficients c = coefficients_of(update);
  int32_t next = update.chunk[blockIdx.x];
  for (int64_t chunk = blockIdx.x; chunk < update.chunks; chunk += gridDim.x) {
    const int32_t number = next;
    if (chunk + gridDim.x < update.chunks) next = update.chunk[chunk + gridDim.x];
    const Spot spot(update, static_cast<uint32_t>(chunk), number);
    const float size = update.sizes != nullptr ? update.sizes[number] : c.size;
    if (spot.first() >= spot.t.count) continue;
    Piece<kRule, T, false> piece;
    piece.read(spot);
    step<kRule, T>(update, c, spot, size, piece);
  }
}

}  // namespace

const char* update_32bit(const Update& update, void* stream) {
  return with_rule(update.optimizer, [&](auto rule) {
    return with_dtype(update.dtype, [&](auto type) {
      HALFBYTE_LAUNCH((update_32bit_kernel<rule.value, decltype(type)>), grid_for(update.chunks, 8),
                      update_threads(), 0, stream, update);
      return launched();
    });
  });
}

}  // namespace halfbyte::gpu
