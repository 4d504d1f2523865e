// dictionary_lookup for baseline.
#define PLANMILL_SSE2
#include "neighbors/lookup_kernels.h"

namespace planmill {

const LookupKernels* lookup_baseline() {
  static constexpr LookupKernels kernels = lookup_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
