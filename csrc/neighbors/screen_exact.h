// Exact float32 work on candidates, written once over a vector type of common/vec.h.
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace planmill {
namespace {

// Four rows at a time against one: x is loaded once, and four sums hide the latency of the multiply-adds.
template <class V, bool Distance, int Rows>
inline void against(const float* x, const float* const* y, int64_t d, float* out) {
  typename V::F acc[Rows];
  float tail[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) acc[r] = V::zero(), tail[r] = 0.0f;
  int64_t i = 0;
  for (; i + V::kWidth <= d; i += V::kWidth) {
    const auto u = V::load(x + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const auto w = V::load(y[r] + i);
      if constexpr (Distance) {
        const auto gap = V::sub(u, w);
        acc[r] = V::fma(gap, gap, acc[r]);
      } else {
        acc[r] = V::fma(u, w, acc[r]);
      }
    }
  }
  for (; i < d; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const float gap = x[i] - y[r][i];
      tail[r] += Distance ? gap * gap : x[i] * y[r][i];
    }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) out[r] = V::sum(acc[r]) + tail[r];
}

template <class V, bool Distance>
void against_all(const float* x, const float* const* y, int64_t count, int64_t d, float* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) against<V, Distance, 4>(x, y + r, d, out + r);
  for (; r < count; ++r) against<V, Distance, 1>(x, y + r, d, out + r);
}

}  // namespace
}  // namespace planmill
