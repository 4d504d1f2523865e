#include "routing/rows_of.h"

#include "common/cpu_capability.h"

namespace planmill {

const RowKernels& row_kernels() {
  return choose_kernels(rows_baseline(), rows_avx2(), rows_avx512());
}

Element element_of(at::ScalarType type) {
  return type == at::kFloat ? Element::kFloat : type == at::kBFloat16 ? Element::kBFloat16 : Element::kHalf;
}

}  // namespace planmill
