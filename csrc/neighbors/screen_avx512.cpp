// AVX-512 with VNNI: 12 x 32 products in 24 registers; vpdpwssd does 32 multiply-adds and the sum in one instruction.
// PLANMILL_EMULATE: the same code over plain C++ vectors, for tests on machines without AVX-512.
#ifndef PLANMILL_EMULATE
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define PLANMILL_AVX512
#endif
#include "neighbors/screen_bytes.h"
#include "neighbors/screen_floats.h"

namespace planmill {
namespace {
#ifdef PLANMILL_EMULATE
using Vec = VecGeneric<16>;
#else
using Vec = VecAvx512;
#endif
}  // namespace

const ScreenKernels* screen_avx512() {
  static constexpr ScreenKernels kernels = integer_kernels<Vec, 12, 2>("avx512", 192);
  return &kernels;
}

const ScreenKernels* screen_floats_avx512() {
  static constexpr ScreenKernels kernels = float_kernels<Vec, 12, 2>("avx512 floats", 192);
  return &kernels;
}

const ScreenKernels* screen_bytes_avx512() {
  static constexpr ScreenKernels kernels = byte_kernels<Vec, 12, 2>("avx512 bytes", 192);
  return &kernels;
}

}  // namespace planmill
