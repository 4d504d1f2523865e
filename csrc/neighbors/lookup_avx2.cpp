// dictionary_lookup for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "neighbors/lookup_kernels.h"

namespace planmill {

const LookupKernels* lookup_avx2() {
  static constexpr LookupKernels kernels = lookup_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
