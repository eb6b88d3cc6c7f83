// optimizer.cu: what an update needs besides its kernel: the plan of its tensors and, where step, learning rate or
// gradient scale are on the device, its coefficients.
//
// Plan      Records travel as arguments of kernels, kRows at a time: nothing is read from the host later, so that
//           a graph can capture it.  The chunk table is filled by a search over the records.
#include <math.h>

#include "optimizer.cuh"

namespace halfbyte::gpu {
namespace {

constexpr int kRows = 40;  // 3.5 of the 4 KiB that arguments may have

struct Rows {
  UpdateTensor row[kRows];
};

__global__ void __launch_bounds__(64) rows_kernel(const Rows rows, int count, UpdateTensor* to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = rows.row[i];
}

__global__ void __launch_bounds__(256)
    chunks_kernel(const UpdateTensor* tensor, int64_t tensors, int64_t chunks, int32_t* chunk) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= chunks) return;
  int64_t low = 0, high = tensors;  // the last tensor that begins at or before c
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (tensor[middle].first <= c ? low : high) = middle;
  }
  chunk[c] = static_cast<int32_t>(low);
}

HALFBYTE_DEVICE double read_number(Scalar scalar) {
  switch (scalar.type) {
    case Number::float32:
      return *static_cast<const float*>(scalar.value);
    case Number::float64:
      return *static_cast<const double*>(scalar.value);
    case Number::int64:
      return static_cast<double>(*static_cast<const int64_t*>(scalar.value));
    case Number::none:
      break;
  }
  return 1.0;
}

__global__ void __launch_bounds__(32) coefficients_kernel(Optimizer optimizer, Hyper hyper, Scalar step,
                                                          Scalar lr, Scalar scale, Coefficients* out) {
  if (threadIdx.x != 0) return;
  const double t = read_number(step), rate = read_number(lr);
  const bool adam = optimizer == Optimizer::adam, mixed = optimizer == Optimizer::ademamix;
  const bool decoupled = adam || mixed || optimizer == Optimizer::lion;
  const double c1 = 1.0 - pow(hyper.beta1, t), c2 = sqrt(1.0 - pow(hyper.beta2, t));
  double alpha = hyper.alpha, slow = hyper.beta3;
  if (hyper.t_alpha != 0) alpha = fmin(t * (hyper.alpha / static_cast<double>(hyper.t_alpha)), hyper.alpha);
  if (hyper.t_beta3 != 0) {
    const double x = t * (1.0 / static_cast<double>(hyper.t_beta3));
    const double ln1 = log(hyper.beta1), ln3 = log(hyper.beta3);
    slow = fmin(exp(ln1 * ln3 / ((1.0 - x) * ln3 + x * ln1)), hyper.beta3);
  }
  Coefficients c;
  c.beta1 = static_cast<float>(optimizer == Optimizer::momentum && t == 1.0 ? 0.0 : hyper.beta1);
  c.rest1 = static_cast<float>(1.0 - hyper.beta1);
  c.beta2 = static_cast<float>(hyper.beta2);
  c.rest2 = static_cast<float>(1.0 - hyper.beta2);
  c.beta3 = static_cast<float>(slow);
  c.rest3 = static_cast<float>(1.0 - slow);
  c.alpha = static_cast<float>(alpha);
  c.decay = static_cast<float>(decoupled ? 1.0 - rate * hyper.weight_decay : 1.0);
  c.coupled = static_cast<float>(decoupled ? 0.0 : hyper.weight_decay);
  c.size = static_cast<float>(adam ? rate * c2 / c1 : rate);
  c.eps = static_cast<float>(adam ? hyper.eps * c2 : hyper.eps);
  c.inverse1 = static_cast<float>(adam || mixed ? 1.0 / c1 : 1.0);
  c.inverse2 = static_cast<float>(adam || mixed ? 1.0 / c2 : 1.0);
  c.norm = static_cast<float>(adam ? c2 / c1 : 1.0);
  c.scale = static_cast<float>(read_number(scale));
  c.drawn = hash32(static_cast<uint32_t>(static_cast<int64_t>(t)));
  *out = c;
}

int64_t chunks_of(int64_t count) { return ceil_div(count, kUpdateChunk); }

}  // namespace

int64_t update_chunks(const int64_t* fields, int64_t tensors) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < tensors; ++i) chunks += chunks_of(fields[i * kUpdateFields + 6]);
  return chunks;
}

const char* plan_update(const int64_t* fields, int64_t tensors, int64_t chunks, Optimizer optimizer,
                        DType dtype, int states, UpdateTensor* tensor, int32_t* chunk, void* stream) {
  const int run = states == 1 && dtype != DType::float32 ? 8 : 4;  // as Lanes8 has it
  const int param_bytes = dtype == DType::float32 ? 4 : 2;
  int64_t first = 0;
  for (int64_t begin = 0; begin < tensors; begin += kRows) {
    Rows rows = {};
    const int count = static_cast<int>(tensors - begin < kRows ? tensors - begin : kRows);
    for (int i = 0; i < count; ++i) {
      const int64_t* field = fields + (begin + i) * kUpdateFields;
      const auto pointer = [&](int number) {
        return reinterpret_cast<void*>(static_cast<uintptr_t>(field[number]));
      };
      UpdateTensor& t = rows.row[i];
      t = {pointer(0),
           pointer(1),
           pointer(2),
           pointer(3),
           static_cast<float*>(pointer(4)),
           static_cast<float*>(pointer(5)),
           field[6],
           field[7],
           first,
           static_cast<uint32_t>(field[8]),
           0};
      first += chunks_of(t.count);
      const uintptr_t wide = static_cast<uintptr_t>(run * param_bytes),
                      narrow = static_cast<uintptr_t>(run * states);
      const int64_t behind = optimizer == Optimizer::ademamix ? t.count * states : 0;
      t.whole = aligned(t.param, wide) && aligned(t.grad, wide) && aligned(t.state1, narrow) &&
                aligned(t.state2, narrow) && behind % static_cast<int64_t>(narrow) == 0;
    }
    HALFBYTE_LAUNCH((rows_kernel), 1, 64, 0, stream, rows, count, tensor + begin);
    if (const char* error = launched()) return error;
  }
  HALFBYTE_LAUNCH((chunks_kernel), static_cast<unsigned>(ceil_div(chunks, 256)), 256, 0, stream, tensor,
                  tensors, chunks, chunk);
  return launched();
}

const char* update_coefficients(Optimizer optimizer, Hyper hyper, Scalar step, Scalar lr, Scalar scale,
                                Coefficients* out, void* stream) {
  HALFBYTE_LAUNCH((coefficients_kernel), 1, 32, 0, stream, optimizer, hyper, step, lr, scale, out);
  return launched();
}

}  // namespace halfbyte::gpu
