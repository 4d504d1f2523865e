// Arithmetic of the covariance op: centred rows packed into panels, products of panels.
#pragma once

#include <cstdint>

namespace planmill {

constexpr int64_t kCovarianceRows = 128;  // rows of a packed block: two panels of it stay in a first-level cache
constexpr int64_t kPanelPad = 16;  // floats after a panel: without them all panels of a row would share one cache set

struct CovarianceKernels {
  int64_t panel;  // columns of a panel

  // Floats from one panel of a block to the next.
  int64_t stride() const { return kCovarianceRows * panel + kPanelPad; }

  // One block of at most kCovarianceRows rows of x [rows, d], z = x - pivot, every row with its own pivot. The panel of
  // columns p * panel ... begins at packed[p * stride()], row by row; columns beyond d are zeros. With a = |z|^2 of each
  // row and d rounded up to whole panels: sums[0 .. d) = sum z, sums[d .. 2 d) = sum a z, sums[2 d] = sum a^2;
  // `sums` null: none of them.
  void (*pack)(const float* x, const float* const* pivots, int64_t rows, int64_t d, float* packed, float* sums);

  // c [panel, panel] += sum over rows of a[row, i] * b[row, j], a and b panels of one block, for the first `columns` of b;
  // where a is b, only what lies on and above the diagonal is summed, and some of what lies below.
  void (*multiply)(const float* a, const float* b, int64_t rows, int64_t columns, float* c);

  // sums [d] += row - pivot, while the row `next` is fetched.
  void (*accumulate)(const float* row, const float* pivot, const float* next, int64_t d, float* sums);
};

const CovarianceKernels* covariance_baseline();
const CovarianceKernels* covariance_avx2();
const CovarianceKernels* covariance_avx512();

}  // namespace planmill
