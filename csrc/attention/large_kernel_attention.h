// Large-kernel attention: two depthwise convolutions of one plane, and a product of all channels with an epilogue.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace planmill {

struct LargeKernelPlane {
  Element type;
  const void* x;  // [height, width], contiguous
  int64_t height, width;
  const float* weight5;  // [5, 5]
  const float* weight7;  // [7, 7]
  float bias5, bias7;
  float* out;  // [height, width]
};

// out[c, p] = x[c, p] * (weight[c] . t[:, p] + bias[c]) for channels [first_channel, last_channel) and pixels [first, last),
// at most `block` of them. Rows of t lie `ldt` numbers apart, those of x and out `pixels`.
struct LargeKernelPoint {
  Element type;
  const float* t;
  int64_t ldt, channels, pixels;
  const float* weight;  // [channels, channels]
  const float* bias;
  const void* x;
  void* out;
};

struct LargeKernelKernels {
  int64_t block;
  int64_t (*plane_scratch)(int64_t height, int64_t width);
  // `scratch` is zero before the first of planes of one size, and is handed on from plane to plane: borders stay zero.
  void (*plane)(const LargeKernelPlane& plane, float* scratch);
  int64_t (*point_scratch)(int64_t channels);
  void (*point)(const LargeKernelPoint& point, int64_t first_channel, int64_t last_channel, int64_t first, int64_t last,
                float* scratch);
};

const LargeKernelKernels* large_kernel_attention_baseline();
const LargeKernelKernels* large_kernel_attention_avx2();
const LargeKernelKernels* large_kernel_attention_avx512();

}  // namespace planmill
