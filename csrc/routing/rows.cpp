#include "routing/rows_of.h"

#include "common/cpu_capability.h"

namespace planmill {

const RowKernels& row_kernels() {
  switch (cpu_capability()) {
    case CpuCapability::kAmx:
    case CpuCapability::kAvx512:
      return *rows_avx512();
    case CpuCapability::kAvx2:
      return *rows_avx2();
    default:
      return *rows_baseline();
  }
}

Element element_of(at::ScalarType type) {
  return type == at::kFloat ? Element::kFloat : type == at::kBFloat16 ? Element::kBFloat16 : Element::kHalf;
}

}  // namespace planmill
