// Bounds of sparse_encoding for baseline.
#define PLANMILL_SSE2
#include "routing/encoding_kernels.h"

namespace planmill {

const EncodingKernels* encoding_baseline(bool integer) {
  return encoding_kernels<VecSse2>(integer);
}

}  // namespace planmill
