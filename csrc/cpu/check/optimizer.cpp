// optimizer.cpp: the optimizer updates, in place, over lists of odd sizes; every level agrees bit for bit.
#include <cstring>

#include "check.h"

namespace halfbyte::check {
namespace {

using cpu::Update;
using cpu::UpdateTensor;

constexpr Optimizer kOptimizers[] = {Optimizer::adam,     Optimizer::ademamix, Optimizer::lion,
                                     Optimizer::momentum, Optimizer::rmsprop,  Optimizer::adagrad};
const char* const kNames[] = {"adam", "ademamix", "lion", "momentum", "rmsprop", "adagrad"};

constexpr cpu::Coefficients kStep = {0.9f,   0.1f, 0.99f, 0.01f, 0.999f, 0.001f, 5.0f,
                                     0.999f, 0.1f, 0.01f, 1e-8f, 3.7f,   7.1f,   0.5};

int64_t firsts(Optimizer optimizer) { return optimizer == Optimizer::ademamix ? 2 : 1; }
bool has_second(Optimizer optimizer) {
  return optimizer == Optimizer::adam || optimizer == Optimizer::ademamix;
}

// Second moments are not negative.
Bytes magnitudes(Random& random, int64_t count) {
  Bytes out = floats(random, count, DType::float32, 0);
  for (size_t i = 3; i < out.size(); i += 4) out[i] &= 0x7f;
  return out;
}

struct Kind {
  DType dtype;
  Optimizer optimizer;
  int64_t blocksize;  // 0: fp32 states
  bool trust, skip_zeros, stochastic;
};

// Outputs begin as copies of the inputs: of each tensor param, grad, state1, state2, absmax1, absmax2.
void updates(Random& random, const Kind& kind, const std::vector<int64_t>& counts) {
  const bool coded = kind.blocksize != 0;
  const int64_t first = firsts(kind.optimizer), second = has_second(kind.optimizer) ? 1 : 0;
  Case c;
  c.name = std::string(coded ? "update_8bit " : "update_32bit ") + kNames[static_cast<int>(kind.optimizer)] +
           " dtype " + std::to_string(static_cast<int>(kind.dtype)) + " blocks of " +
           std::to_string(kind.blocksize) + (kind.trust ? " trust" : "") + " of " +
           std::to_string(counts.size());
  for (const int64_t count : counts) {
    const int64_t blocks = coded ? (count + kind.blocksize - 1) / kind.blocksize : 0;
    c.in.push_back(floats(random, count, kind.dtype, 0));
    c.in.push_back(floats(random, count, kind.dtype, coded ? 4 : 1));
    c.in.push_back(coded ? bytes(random, first * count) : magnitudes(random, first * count));
    c.in.push_back(coded ? bytes(random, second * count) : magnitudes(random, second * count));
    c.in.push_back(magnitudes(random, first * blocks));
    c.in.push_back(magnitudes(random, second * blocks));
  }
  for (const Bytes& in : c.in) c.out.push_back(static_cast<int64_t>(in.size()));
  c.in.push_back(codebook(random, false));
  Bytes positive = codebook(random, false);
  for (size_t i = 0; i < positive.size(); ++i) positive[i] = c.in.back()[i];
  c.in.push_back(positive);
  c.takes = [=](const Level& level) { return (coded ? level.update_8bit : level.update_32bit) != nullptr; };
  c.call = [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
    std::vector<UpdateTensor> tensors;
    for (size_t i = 0; i < counts.size(); ++i) {
      const int64_t blocks = coded ? (counts[i] + kind.blocksize - 1) / kind.blocksize : 0;
      for (size_t k = 0; k < 6; ++k) {
        const int64_t size[] = {counts[i] * size_of(kind.dtype),
                                counts[i] * size_of(kind.dtype),
                                first * counts[i] * (coded ? 1 : 4),
                                second * counts[i] * (coded ? 1 : 4),
                                first * blocks * 4,
                                second * blocks * 4};
        if (size[k] != 0) std::memcpy(out[6 * i + k], in[6 * i + k], static_cast<size_t>(size[k]));
      }
      float* const absmax1 = static_cast<float*>(out[6 * i + 4]);
      float* const slow = first == 2 && coded ? absmax1 + blocks : nullptr;
      tensors.push_back({out[6 * i], out[6 * i + 1], out[6 * i + 2], second != 0 ? out[6 * i + 3] : nullptr,
                         absmax1, slow, static_cast<float*>(out[6 * i + 5]), counts[i],
                         static_cast<uint32_t>(i) * 77u});
    }
    const Update update = {kind.optimizer,
                           kind.dtype,
                           kStep,
                           0.5f,
                           kind.trust ? 0.02 : 0.0,
                           1e-8,
                           kind.skip_zeros,
                           kind.stochastic,
                           kind.blocksize,
                           static_cast<const float*>(in[6 * counts.size()]),
                           second != 0 ? static_cast<const float*>(in[6 * counts.size() + 1]) : nullptr,
                           tensors.data(),
                           static_cast<int64_t>(tensors.size())};
    return coded ? level.update_8bit(update, threads) : level.update_32bit(update, threads);
  };
  const DType dtype = kind.dtype;
  c.differs = [=](const std::vector<Bytes>& want, const std::vector<Bytes>& got) -> std::string {
    for (size_t i = 0; i < want.size(); ++i) {
      const size_t part = i % 6;
      const bool number = part < 2 || part > 3 || !coded;
      const std::string text = number
                                   ? float_difference(part < 2 ? dtype : DType::float32, {want[i]}, {got[i]})
                                   : (want[i] == got[i] ? "" : "codes differ");
      if (!text.empty()) return "output " + std::to_string(i) + ": " + text;
    }
    return "";
  };
  run(random, c, false);
}

}  // namespace

void check_optimizer() {
  Random random(20243);
  for (const DType dtype : kDTypes) {
    for (const Optimizer optimizer : kOptimizers) {
      const bool bounded =
          optimizer == Optimizer::adam || optimizer == Optimizer::momentum || optimizer == Optimizer::rmsprop;
      for (const int64_t blocksize : {0, 1, 7, 64, 256, 4096}) {
        for (int variant = 0; variant < 4; ++variant) {
          const Kind kind = {dtype,        optimizer,
                             blocksize,    bounded && variant == 1,
                             variant == 2, dtype == DType::bfloat16 && variant == 3};
          updates(random, kind, {300, 1, 0, 17, 513});
          updates(random, kind, {blocksize == 1 ? 2000 : 20003});
        }
      }
    }
  }
}

}  // namespace halfbyte::check
