// sparse_decoding for baseline.
#define PLANMILL_SSE2
#include "routing/decoding_kernels.h"

namespace planmill {

const DecodingKernels* decoding_baseline() {
  static constexpr DecodingKernels kernels = decoding_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
