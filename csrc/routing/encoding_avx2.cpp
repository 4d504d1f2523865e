// Bounds of sparse_encoding for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "routing/encoding_kernels.h"

namespace planmill {

const EncodingKernels* encoding_avx2(bool integer) {
  return encoding_kernels<VecAvx2>(integer);
}

}  // namespace planmill
