// Row arithmetic of lora_mixture.
#pragma once

#include <cstdint>

namespace planmill {

struct LoraMixtureKernels {
  // y[t] = base + sum over j of p[t][j] up[j], for `rows` rows of p [rows, ranks] and up [ranks, width]; base is bias (null:
  // zero), or what y holds where `add` is set.
  void (*expand)(float* y, int64_t rows, int64_t width, const float* bias, bool add, const float* p, const float* up,
                 int64_t ranks);
};

const LoraMixtureKernels* lora_mixture_baseline();
const LoraMixtureKernels* lora_mixture_avx2();
const LoraMixtureKernels* lora_mixture_avx512();

}  // namespace planmill
