// Softmax attention: some queries of one head at a time, its keys and values packed block by block.
#pragma once

#include <cstdint>

namespace planmill {

// Rows of one head where they lie: element (n, c) is data[n * row + c * channel].
struct AttentionRows {
  const float* data;
  int64_t row, channel;
};

struct AttentionShape {
  int64_t keys, d, dv;  // channels of q and k, of v
  float scale;
  int64_t block;        // keys of a block, but for the last
  int64_t queries;      // of a task, at most
  int64_t dv_padded;    // to whole panels

  int64_t blocks() const { return (keys + block - 1) / block; }
};

struct AttentionHead {
  AttentionRows q, k, v;
  float* y;  // [queries, dv], rows `row` apart
  int64_t row;
};

struct SoftmaxAttentionKernels {
  int64_t width;  // of a vector
  int64_t slab;   // queries whose scores stand side by side
  // Queries [first, last) of a head; scratch: attention_scratch floats. `packed`: the last call with this scratch was of
  // the same head and of one block, whose keys and values are still there.
  void (*attend)(const AttentionShape& shape, const AttentionHead& head, int64_t first, int64_t last, bool packed,
                 float* scratch);
};

// Floats that `attend` works in: keys and values of a block, scores and queries of a slab; sums, maxima and totals of a task.
inline int64_t attention_scratch(const AttentionShape& s, int64_t slab) {
  return s.block * (s.d + s.dv_padded + slab) + s.d * slab + s.queries * (s.dv_padded + 2);
}

const SoftmaxAttentionKernels* softmax_attention_baseline();
const SoftmaxAttentionKernels* softmax_attention_avx2();
const SoftmaxAttentionKernels* softmax_attention_avx512();

}  // namespace planmill
