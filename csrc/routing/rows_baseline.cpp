// Sums of rows for baseline.
#define PLANMILL_SSE2
#include "routing/rows_kernels.h"

namespace planmill {

const RowKernels* rows_baseline() {
  static constexpr RowKernels kernels = row_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
