// Routing of one token: its k best experts and their weights.
#pragma once

#include <cstdint>

namespace planmill {

constexpr int64_t kRoutingBlock = 64;  // experts whose maximum is kept while the k best are taken one by one

struct Routing {
  int64_t experts, k, groups, top_groups;
  const float* bias;  // null: none
  bool sigmoid;       // else softmax
  bool topk_first;    // softmax over the chosen
  bool renormalize, mask_with_zero;
  float eps, scale;
};

// Experts of a row as it is held: whole blocks, or one block of whole vectors of any instruction set.
inline int64_t routing_width(int64_t experts) {
  const int64_t unit = experts > kRoutingBlock ? kRoutingBlock : 16;
  return (experts + unit - 1) / unit * unit;
}

// Floats of scratch that a thread needs: logits and offers, padded to whole blocks; maxima of blocks and groups;
// the logits of the k chosen.
inline int64_t routing_scratch(const Routing& r) {
  const int64_t padded = routing_width(r.experts);
  return 2 * padded + padded / kRoutingBlock + 1 + r.groups + r.k + kRoutingBlock;
}

struct RoutingKernels {
  void (*route)(const Routing& routing, const float* logits, int64_t tokens, float* scratch, int32_t* indices,
                float* weights);
};

const RoutingKernels* routing_baseline();
const RoutingKernels* routing_avx2();
const RoutingKernels* routing_avx512();

}  // namespace planmill
