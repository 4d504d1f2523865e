// Arithmetic of cluster_members and cluster_attention on the tokens of one head.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace planmill {

// Rows of one head: row i begins `stride` elements after row i - 1; their `width` elements lie side by side.
struct HeadRows {
  Element type;
  const void* data;
  int64_t stride, width;
};

// One cluster of one head; every list and mask is that of its head. Masks are null where absent.
struct Cluster {
  HeadRows q, k, v;
  const int32_t* q_members;
  const int32_t* k_members;  // ascending where `causal` or `shared`, and then equal to q_members where `shared`
  int64_t queries, keys, memory;
  const float* memory_k;  // [memory, q.width]
  const float* memory_v;  // [memory, v.width]
  const uint8_t* q_mask;
  const uint8_t* k_mask;
  float scale;
  bool causal, shared;
};

struct ClusterKernels {
  int64_t width;  // of a vector: rows of packed operands and of results are padded to it

  // scores [tokens, padded] = <x_n / |x_n|, mean_c>, NaN as -inf, of tokens [first, first + tokens). `means` [x.width,
  // padded] stands with clusters in its columns; `unit` is scratch [tokens, x.width].
  void (*score)(const HeadRows& x, int64_t first, int64_t tokens, const float* means, int64_t padded, float* unit,
                float* scores);
  // The columns of one row of scores that are above their thresholds (NaN: everything is), ascending; returns how many.
  int64_t (*above)(const float* scores, const float* thresholds, int64_t padded, int32_t* columns);

  // Which `wanted` of `count` scores are largest, the earlier of equal ones: moved to the front with their tokens, in their
  // order. `floor` becomes what any further score must be above. There is room for a vector more.
  void (*keep_largest)(float* scores, int32_t* tokens, int64_t count, int64_t wanted, float& floor);

  int64_t (*attend_scratch)(const Cluster& cluster);  // floats
  // out [queries, v.width padded]: the attention of one cluster.
  void (*attend)(const Cluster& cluster, float* scratch, float* out);

  // out [width], of `type` = the mean of `rows`, with epsilon in the denominator; zero where there is none.
  void (*combine)(const float* const* rows, int64_t count, int64_t width, Element type, void* out);
};

const ClusterKernels* clusters_baseline();
const ClusterKernels* clusters_avx2();
const ClusterKernels* clusters_avx512();

}  // namespace planmill
