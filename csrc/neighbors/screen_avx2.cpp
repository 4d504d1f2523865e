// AVX2: 6 x 16 products in 12 registers; vpmaddwd does 16 multiply-adds where an fp32 FMA does 8.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "neighbors/screen_bytes.h"
#include "neighbors/screen_floats.h"

namespace planmill {

const ScreenKernels* screen_avx2() {
  static constexpr ScreenKernels kernels = integer_kernels<VecAvx2, 6, 2>("avx2", 96);
  return &kernels;
}

const ScreenKernels* screen_floats_avx2() {
  static constexpr ScreenKernels kernels = float_kernels<VecAvx2, 6, 2>("avx2 floats", 96);
  return &kernels;
}

const ScreenKernels* screen_bytes_avx2() {
  static constexpr ScreenKernels kernels = byte_kernels<VecAvx2, 6, 2>("avx2 bytes", 96);
  return &kernels;
}

}  // namespace planmill
