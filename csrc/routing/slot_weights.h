// Row and column arithmetic of slot_weights, on the logits of one image.
#pragma once

#include <cstdint>

namespace planmill {

// One image: logits [tokens, slots], contiguous; `scale` and `mask` null where absent. A column pass writes dispatch, a row
// pass combine. `shift`, `rest` and `inverse` (null: softmax rows) hold each slot's mean in two parts and 1 / deviation;
// they are written by the column pass and read by the row pass, padded to column_block.
struct SlotImage {
  const float* logits;
  const float* scale;
  const uint8_t* mask;
  int64_t tokens, slots;
  bool scale_dispatch;
  float* dispatch;
  float* combine;
  float* shift;
  float* rest;
  float* inverse;
};

struct SlotWeightsKernels {
  int64_t column_block;
  // Slots [first, first + column_block) of an image, those of them that there are; scratch: 2 * tokens * column_block.
  void (*columns)(const SlotImage& image, int64_t first, float* scratch);
  // Tokens [first, last); scratch: slots rounded up to column_block.
  void (*rows)(const SlotImage& image, int64_t first, int64_t last, float* scratch);
};

const SlotWeightsKernels* slot_weights_baseline();
const SlotWeightsKernels* slot_weights_avx2();
const SlotWeightsKernels* slot_weights_avx512();

}  // namespace planmill
