// gpu_optimizer.h: the optimizer updates of the portable GPU module; gpu.h says what holds for every launcher.
//
// A plan lies in device memory: one UpdateTensor per parameter, and per chunk of kUpdateChunk elements the number
// of its tensor.  It is made by kernels from arguments, so that making it can be captured too.
#pragma once
#include "halfbyte/types.h"

namespace halfbyte::gpu {

constexpr int64_t kUpdateChunk = 2048;  // elements; whole blocks of kUpdateBlock
constexpr int64_t kUpdateBlock = 256;   // the only block size of 8-bit states
constexpr int kUpdateFields = 9;        // of a tensor, see plan_update

// One parameter.  States are fp32, or uint8 codes with absmax; what an optimizer does not keep is nullptr.
struct alignas(16) UpdateTensor {
  void* param;
  const void* grad;
  void* state1;  // AdEMAMix: two of them, one behind the other
  void* state2;
  float* absmax1;
  float* absmax2;
  int64_t count;
  int64_t slow;    // where in absmax1 the second state of AdEMAMix begins
  int64_t first;   // its first chunk
  uint32_t seed;   // of stochastic rounding
  uint32_t whole;  // whether every tensor is aligned for wide accesses
};

// Computed in fp64 and rounded once; names as in ops/rules.py.  scale multiplies gradients, drawn is hash32(step).
struct Coefficients {
  float beta1, rest1, beta2, rest2, beta3, rest3, alpha, decay, coupled, size, eps, inverse1, inverse2, norm,
      scale;
  uint32_t drawn;
};

enum class Number : int32_t { none = 0, float32 = 1, float64 = 2, int64 = 3 };

// One number on the device.
struct Scalar {
  const void* value;
  Number type;
};

// What a user sets.
struct Hyper {
  double beta1, beta2, beta3, eps, weight_decay, alpha;
  int64_t t_alpha, t_beta3;
};

// One step.  coefficients: on the device, or nullptr for `host`.  sizes: what each tensor's step size is with a
// trust factor, nullptr without.
struct Update {
  Optimizer optimizer;
  DType dtype;
  bool skip_zeros, stochastic;
  int64_t tensors, chunks;
  const UpdateTensor* tensor;
  const int32_t* chunk;
  const float* codebook1;
  const float* codebook2;
  const float* sizes;
  const Coefficients* coefficients;
  Coefficients host;
};

// How many chunks the tensors have that `fields` describes: kUpdateFields numbers for each, the addresses of
// param, grad, state1, state2, absmax1 and absmax2, then count, slow and seed.
int64_t update_chunks(const int64_t* fields, int64_t tensors);

// Fills tensor [tensors] and chunk [chunks].  states: bytes per element of a state.
const char* plan_update(const int64_t* fields, int64_t tensors, int64_t chunks, Optimizer optimizer,
                        DType dtype, int states, UpdateTensor* tensor, int32_t* chunk, void* stream);

// The coefficients of one step from numbers on the device; type `none` of `scale` stands for 1.
const char* update_coefficients(Optimizer optimizer, Hyper hyper, Scalar step, Scalar lr, Scalar scale,
                                Coefficients* out, void* stream);

// sizes[i] = trust factor * step size, by way of two sums per chunk in `partial`.
const char* update_trust(const Update& update, bool quantized, double max_unorm, double eps, double* partial,
                         float* sizes, void* stream);

const char* update_32bit(const Update& update, void* stream);
const char* update_8bit(const Update& update, void* stream);

}  // namespace halfbyte::gpu
