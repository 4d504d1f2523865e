// stem_convolution for AVX-512; PLANMILL_EMULATE: see common/vec.h.
#ifndef PLANMILL_EMULATE
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define PLANMILL_AVX512
#endif
#include "convolution/stem_kernels.h"

namespace planmill {
namespace {
#ifdef PLANMILL_EMULATE
using Vec = VecGeneric<16>;
#else
using Vec = VecAvx512;
#endif
}  // namespace

const StemKernels* stem_avx512() {
  static constexpr StemKernels kernels = stem_kernels<Vec>();
  return &kernels;
}

}  // namespace planmill
