// The screen in float32, for few rows on one side: the products cost twice those of 16 bits, but a row is packed by copying
// it, and almost no second row comes within the bound.
#pragma once

#include "common/products.h"
#include "neighbors/screen_kernels.h"

namespace planmill {
namespace {

inline int64_t words_of_floats(int64_t d) { return d; }

// A sum of d products, in any order, is within d + 1 roundings of |x||y|; each of the two rows answers for half of that.
template <class V>
void keep_floats(const float* x, int64_t d, int64_t words, bool, uint32_t* out, RowStats* stats) {
  const float squares = sum_of_squares<V>(x, d), norm = __builtin_sqrtf(squares) * kUp + kTiny;
  if (reinterpret_cast<const float*>(out) != x) __builtin_memcpy(out, x, static_cast<uint64_t>(words) * sizeof(float));
  *stats = {1.0f, 0.5f * squares, norm, 3.0e-8f * static_cast<float>(d + 1) * norm};
}

template <int Panel>
void put_behind(const uint32_t* rows, int64_t words, uint32_t* panel) {
  __builtin_memcpy(panel, rows, static_cast<uint64_t>(Panel * words) * sizeof(uint32_t));
}

template <class V, int MR, int NV>
void multiply_floats(const uint32_t* left, const uint32_t* right, int64_t left_panels, int64_t right_panels,
                     int64_t words, void* out, int64_t ld) {
  constexpr int NR = NV * V::kWidth;
  const auto *x = reinterpret_cast<const float*>(left), *y = reinterpret_cast<const float*>(right);
  auto* c = static_cast<float*>(out);
  for (int64_t j = 0; j < right_panels; ++j)
    for (int64_t p = 0; p < words; p += kPairBlock) {
      const int64_t depth = words - p < kPairBlock ? words - p : kPairBlock;
      for (int64_t i = 0; i < left_panels; ++i)
        multiply_tile<V, MR, NV>({x + i * MR * words + p, words, 1}, y + (j * words + p) * NR, NR,
                                 c + i * MR * ld + j * NR, ld, depth, p > 0);
    }
}

template <class V, int MR, int NV>
constexpr ScreenKernels float_kernels(const char* name, int64_t left_rows) {
  ScreenKernels kernels = integer_kernels<V, MR, NV>(name, left_rows);
  kernels.rows_behind = true;
  kernels.integer = false;
  kernels.words = &words_of_floats;
  kernels.quantize_left = &keep_floats<V>;
  kernels.quantize_right = &keep_floats<V>;
  kernels.put_left = &put_behind<MR>;
  kernels.multiply = &multiply_floats<V, MR, NV>;
  kernels.lower_bounds = &lower_bounds<V, false>;
  kernels.maxima = &maxima<V, false>;
  kernels.group_bounds = &group_bounds<V, false>;
  kernels.list_above = &list_above<V, false>;
  kernels.two_lower_bounds = &two_lower_bounds<V, false>;
  kernels.list_nearest = &list_nearest<V, false>;
  return kernels;
}

}  // namespace
}  // namespace planmill
