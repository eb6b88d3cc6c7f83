// collect8.cu: LLM.int8()'s outlier columns of x and of the weight side by side, for linear8_tile.cu, sm_90a.
//
// Out       the list of these columns and their count; where there are more than kFewOutliers of them, both operands of what
//           the integers miss at as many as there is room for, with zeros up to a multiple of 64.
// Work      every block finds the columns; then a thread gathers eight values of a row, neighbours the next eight.
// Bound by  memory where nearly all columns are gathered, else by sectors of which one value is used.
#include "outliers.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 512;

// The columns of the bits in `mask`, ascending: as many as there is room for in `columns`, with zeros up to a multiple of
// 64; all of them and their count, by the first block, for the product.
__device__ __forceinline__ int list(const Rows8& rows, const uint32_t* mask, int words, uint16_t* columns,
                                    int thread) {
  __shared__ int of_warp[kThreads / 32];
  const int lane = thread & 31;
  int before = 0;  // columns of the words that have been listed
  for (int start = 0; start < words; start += kThreads) {
    uint32_t word = start + thread < words ? mask[start + thread] : 0;
    int up_to = __popc(word);
    for (int reach = 1; reach < 32; reach *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, up_to, reach);
      if (lane >= reach) up_to += other;
    }
    if (lane == 31) of_warp[thread / 32] = up_to;
    __syncthreads();
    int at = before + up_to - __popc(word);
    for (int i = 0; i < kThreads / 32; ++i) {
      if (i < thread / 32) at += of_warp[i];
      before += of_warp[i];
    }
    for (; word != 0; word &= word - 1, ++at) {
      const int column = (start + thread) * 32 + __ffs(static_cast<int>(word)) - 1;
      if (at < rows.room) columns[at] = static_cast<uint16_t>(column);
      if (blockIdx.x == 0) rows.list[at] = column;
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && thread == 0) *rows.count = before;
  const int listed = min(before, rows.room);
  if (thread < 64 && listed + thread < (listed + 63) / 64 * 64) columns[listed + thread] = 0;
  __syncthreads();
  return before;
}

template <class T>
__global__ void __launch_bounds__(kThreads) collect(const __grid_constant__ Layer8<T> a) {
#ifdef HALFBYTE_SM90A
  extern __shared__ __align__(16) uint16_t columns[];
  __shared__ uint32_t mask[kMostK8 / 32];
  __shared__ Found found;
  const int thread = threadIdx.x, lane = thread & 31;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int slices = (a.k + 127) / 128;
  mark_outliers<kThreads>(a.rows, 0, slices, mask, &found, thread);
  const int count = list(a.rows, mask, slices * 4, columns, thread);
  if (count <= kFewOutliers) return;
  const int listed = min(count, a.rows.room), pieces = (listed + 63) / 64 * 8;
  const int lanes = pieces >= 32 ? 32 : pieces >= 16 ? 16 : 8;  // of a warp, for a row
  const int64_t first = (int64_t{blockIdx.x} * kThreads + thread) / lanes;
  for (int64_t line = first; line < int64_t{a.m} + a.n; line += int64_t{gridDim.x} * kThreads / lanes) {
    const bool of_x = line < a.m;
    const int row = static_cast<int>(of_x ? line : line - a.m);
    T* to = static_cast<T*>(of_x ? a.rows.x : a.rows.weight) + static_cast<int64_t>(row) * a.rows.room;
    const int8_t* weight = a.weight + static_cast<int64_t>(row) * a.k;
    for (int piece = lane % lanes; piece < pieces; piece += lanes) {
      const uint4 eight = *reinterpret_cast<const uint4*>(columns + piece * 8);
      const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
      float v[8];
      const auto column = [&](int j) { return static_cast<int>(pairs[j / 2] >> j % 2 * 16 & 0xffff); };
      if (of_x) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = missing(a, row, column(j));
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = static_cast<float>(__ldg(weight + column(j)));
      }
      if (piece * 8 + 8 > listed)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (piece * 8 + j >= listed) v[j] = 0.f;
      *reinterpret_cast<uint4*>(to + piece * 8) = make_uint4(pack(v[0], v[1], T()), pack(v[2], v[3], T()),
                                                             pack(v[4], v[5], T()), pack(v[6], v[7], T()));
    }
  }
#endif
}

template <class T>
cudaError_t launch(const Linear8& a, const Rows8& rows) {
  const int bytes = 2 * rows.room;
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_shared_memory<collect<T>>(device, bytes);
  if (e != cudaSuccess) return e;
  cudaLaunchConfig_t config = {};
  config.gridDim = 2 * kMostBlocks8, config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(a.stream);
  cudaLaunchAttribute attributes[2];
  overlapping(attributes, 1);
  config.attrs = attributes, config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, collect<T>, layer_of<T>(a, rows));
}

}  // namespace

const char* collect_outliers(const Linear8& a, const Rows8& rows) {
  if (rows.x == nullptr) return nullptr;
  const cudaError_t e = a.dtype == DType::bfloat16 ? launch<__nv_bfloat16>(a, rows) : launch<__half>(a, rows);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace halfbyte::cuda
