// Products of symmetric matrices that commute, for the Newton-Schulz iteration of matrix_root: torch-free, one variant per
// instruction set.
#pragma once

#include <cstdint>

namespace planmill {

// A matrix [d, d] lies in panels of `panel` columns: element (r, c) at [(c / panel * rows + r) * panel + c % panel], where
// rows is d in whole panels. What lies beyond d is zero.
struct MatrixRootKernels {
  int64_t panel;

  // Of c = a b the panel of columns `column` above the diagonal and down to it, and its mirror image. a and b commute, so
  // that c is symmetric: c[i, j] = sum over k of a[k, i] b[k, j], and half of it is enough.
  void (*multiply)(const float* a, const float* b, float* c, int64_t d, int64_t column);
};

const MatrixRootKernels* matrix_root_baseline();
const MatrixRootKernels* matrix_root_avx2();
const MatrixRootKernels* matrix_root_avx512();

}  // namespace planmill
