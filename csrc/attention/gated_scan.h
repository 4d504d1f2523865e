// gated_linear_attention: the recurrence of one head of one sample.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace planmill {

// A matrix [tokens, channels] of some element type behind any strides, in elements.
struct GatedRows {
  const void* data;  // null: absent
  int64_t row, column;
};

struct GatedSequence {
  Element type, gate_type;
  int64_t tokens, keys, values;
  GatedRows q, k, v, gates, backward_gates;  // backward_gates absent: causal
  float scale;                               // of q, one half for two directions included
  void* out;                                 // [tokens, values], of `type`; rows out_row apart, columns side by side
  int64_t out_row;
  const float* initial;  // [keys, values], or null: zeros
  float* final;          // the same, or null: not wanted
};

struct GatedScanKernels {
  int64_t value_block;  // columns of v are dealt out in multiples of this
  // How many floats `attend` needs for `count` columns of v.
  int64_t (*scratch)(const GatedSequence& sequence, int64_t count);
  // Columns [first, first + count) of the result: each is computed alike whatever first and count are.
  void (*attend)(const GatedSequence& sequence, int64_t first, int64_t count, float* scratch);
};

const GatedScanKernels* gated_scan_baseline();
const GatedScanKernels* gated_scan_avx2();
const GatedScanKernels* gated_scan_avx512();

}  // namespace planmill
