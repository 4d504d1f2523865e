// softmax_attention for AVX-512; PLANMILL_EMULATE: see common/vec.h.
#ifndef PLANMILL_EMULATE
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define PLANMILL_AVX512
#endif
#include "attention/softmax_attention_kernels.h"

namespace planmill {
namespace {
#ifdef PLANMILL_EMULATE
using Vec = VecGeneric<16>;
#else
using Vec = VecAvx512;
#endif
}  // namespace

const SoftmaxAttentionKernels* softmax_attention_avx512() {
  static constexpr SoftmaxAttentionKernels kernels = softmax_attention_kernels<Vec>();
  return &kernels;
}

}  // namespace planmill
