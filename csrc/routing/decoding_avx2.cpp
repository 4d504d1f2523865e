// sparse_decoding for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "routing/decoding_kernels.h"

namespace planmill {

const DecodingKernels* decoding_avx2() {
  static constexpr DecodingKernels kernels = decoding_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
