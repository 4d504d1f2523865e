// packed_linear for AVX-512; PLANMILL_EMULATE: see common/vec.h.
#ifndef PLANMILL_EMULATE
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define PLANMILL_AVX512
#endif
#include "linear/packed_linear_kernels.h"

namespace planmill {
namespace {
#ifdef PLANMILL_EMULATE
using Vec = VecGeneric<16>;
#else
using Vec = VecAvx512;
#endif
}  // namespace

const PackedLinearKernels* packed_linear_avx512() {
  static constexpr PackedLinearKernels kernels = packed_linear_kernels<Vec>();
  return &kernels;
}

}  // namespace planmill
