// The kernels behind PrototypeKernels, written once over a vector type of common/vec.h.
#pragma once

#include "attention/prototypes.h"
#include "common/products.h"
#include "common/vec.h"

namespace planmill {
namespace {

// tau / max(|q|, 1e-12)
template <class V>
float inverse_length(const float* q, int64_t width, float tau) {
  auto sum = V::zero();
  int64_t c = 0;
  for (; c + V::kWidth <= width; c += V::kWidth) {
    const auto x = V::load(q + c);
    sum = V::fma(x, x, sum);
  }
  float square = V::sum(sum);
  for (; c < width; ++c) square += q[c] * q[c];
  const float length = __builtin_sqrtf(square);
  return tau / (length < 1e-12f ? 1e-12f : length);
}

template <class V>
void mix_prototypes(const PrototypeTile& t, float* scratch) {
  const int64_t padded = (t.prototypes + kPrototypePad - 1) / kPrototypePad * kPrototypePad;
  const int64_t needed = (t.prototypes + V::kWidth - 1) / V::kWidth * V::kWidth;
  const int64_t all = t.heads * t.prototypes, columns = (t.columns + kPrototypeBlock - 1) / kPrototypeBlock * kPrototypeBlock;
  float* scores = scratch;                     // [rows][padded]
  float* weights = scratch + t.rows * padded;  // [rows][all]
  for (int64_t h = 0; h < t.heads; ++h) {
    multiply<V>({t.q + h * t.head, t.row, 1}, t.keys + h * t.width * padded, padded, scores, padded, t.rows, t.width, needed,
                false);
    for (int64_t i = 0; i < t.rows; ++i) {
      const float factor = inverse_length<V>(t.q + i * t.row + h * t.head, t.width, t.tau[h]);
      float* out = weights + i * all + h * t.prototypes;
      for (int64_t m = 0; m < t.prototypes; ++m) {
        const float a = scores[i * padded + m] * factor;
        out[m] = a < 0.0f ? 0.0f : a;  // NaN stays
      }
    }
  }
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t c = 0; c < columns; c += V::kWidth) V::store(t.out + i * columns + c, V::load(t.bias + c));
  for (int64_t c = 0; c < columns; c += kPrototypeBlock)
    multiply<V>({weights, all, 1}, t.table + c * all, kPrototypeBlock, t.out + c, columns, t.rows, all, kPrototypeBlock, true);
}

template <class V>
constexpr PrototypeKernels prototypes_kernels() {
  return {&mix_prototypes<V>};
}

}  // namespace
}  // namespace planmill
