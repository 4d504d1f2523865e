// Row arithmetic of dictionary_lookup.
#pragma once

#include <cstdint>

namespace planmill {

struct LookupKernels {
  // out[j] = x . rows[j], of exact products summed in double; the same for a row whatever else is asked for with it.
  void (*dots)(const float* x, const float* const* rows, int64_t count, int64_t d, double* out);
  // out += sum of weights[j] * rows[j] over n numbers, in the order of j
  void (*add_rows)(float* out, const float* const* rows, const float* weights, int64_t count, int64_t n);
};

const LookupKernels* lookup_baseline();
const LookupKernels* lookup_avx2();
const LookupKernels* lookup_avx512();

}  // namespace planmill
