// A network's first layer: the convolution of an image of few channels, ReLU, pooling; rows of the result by turns.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace planmill {

constexpr int64_t kStemPanel = 16;  // output channels that stand together

enum class StemPooling : int32_t { kNone, kMax, kAverage };

// out = pool(act(bias + sum over channels and taps of x times packed)), channels-last.
struct StemConvolution {
  Element type;   // of x and out
  const void* x;  // [images, channels, height, width]; the steps between neighbours in each:
  int64_t image_step, channel_step, row_step, column_step;
  int64_t height, width, channels;
  const float* packed;  // [panels, channels, kernel_height, kernel_width, 16], zeros beyond the outputs
  const float* bias;    // [panels, 16]
  void* out;            // [images, out_height, out_width, outputs]
  int64_t out_height, out_width, outputs;
  int64_t kernel_height, kernel_width, stride, padding;
  int64_t conv_height, conv_width;  // what is pooled
  bool relu;
  StemPooling pooling;  // of windows of one pixel where there is none
  int64_t pool_size, pool_stride, pool_padding;
  bool count_padding;  // in an average
  // The padded rows of a call lie in its scratch memory, [channels, strip_rows, strip_width], and there each tap of the
  // kernel so far behind the first one.
  int64_t strip_rows, strip_width;
  const int64_t* taps;  // [channels, kernel_height, kernel_width]
};

struct StemKernels {
  int64_t (*scratch)(const StemConvolution& conv);  // floats that a call needs
  // Rows [first, last) of an image's result, which need no more than strip_rows of the padded image.
  void (*run)(const StemConvolution& conv, int64_t image, int64_t first, int64_t last, float* scratch);
};

const StemKernels* stem_baseline();
const StemKernels* stem_avx2();
const StemKernels* stem_avx512();

}  // namespace planmill
