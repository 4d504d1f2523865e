#include "routing/rows_of.h"

#include "common/cpu_capability.h"

namespace planmill {

const RowKernels& row_kernels() {
  return choose_kernels(rows_baseline(), rows_avx2(), rows_avx512());
}

}  // namespace planmill
