// The kernels behind MatrixRootKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/products.h"
#include "moments/matrix_root.h"

namespace planmill {
namespace {

// Two vectors: the register tile of common/products.h is kProductRows x 2.
template <class V>
constexpr int64_t kRootPanel = 2 * V::kWidth;

// block [panel, panel] = left^T right, both [d, panel]
template <class V>
void multiply_panels(const float* left, const float* right, int64_t d, float* block) {
  constexpr int64_t kPanel = kRootPanel<V>;
  constexpr int kRows = kProductRows<V>, kRest = static_cast<int>(kPanel % kRows);
  for (int64_t r = 0; r + kRows <= kPanel; r += kRows)
    multiply_tile<V, kRows, 2>({left + r, 1, kPanel}, right, kPanel, block + r * kPanel, kPanel, d, false);
  multiply_tile<V, kRest, 2>({left + kPanel - kRest, 1, kPanel}, right, kPanel, block + (kPanel - kRest) * kPanel, kPanel,
                             d, false);
}

// mirror = block^T, both [panel, panel]
template <class V>
void transpose_block(const float* block, float* mirror) {
  constexpr int64_t kPanel = kRootPanel<V>;
  for (int64_t r = 0; r < kPanel; ++r)
    for (int64_t s = 0; s < kPanel; ++s) mirror[s * kPanel + r] = block[r * kPanel + s];
}

template <class V>
void multiply_column(const float* a, const float* b, float* c, int64_t d, int64_t column) {
  constexpr int64_t kPanel = kRootPanel<V>;
  const int64_t rows = (d + kPanel - 1) / kPanel * kPanel;
  for (int64_t i = 0; i <= column; ++i) {
    float* block = c + (column * rows + i * kPanel) * kPanel;
    multiply_panels<V>(a + i * rows * kPanel, b + column * rows * kPanel, d, block);
    if (i < column) {
      transpose_block<V>(block, c + (i * rows + column * kPanel) * kPanel);
      continue;
    }
    for (int64_t r = 0; r < kPanel; ++r)
      for (int64_t s = r + 1; s < kPanel; ++s) block[s * kPanel + r] = block[r * kPanel + s];
  }
}

template <class V>
constexpr MatrixRootKernels matrix_root_kernels() {
  return {kRootPanel<V>, &multiply_column<V>};
}

}  // namespace
}  // namespace planmill
