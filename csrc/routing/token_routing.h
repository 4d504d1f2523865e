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

// Floats of scratch that a thread needs: logits and offers, padded to whole blocks; maxima of blocks and groups;
// the logits of the k chosen.
inline int64_t routing_scratch(const Routing& r) {
  const int64_t padded = (r.experts + kRoutingBlock - 1) / kRoutingBlock * kRoutingBlock;
  return 2 * padded + padded / kRoutingBlock + r.groups + r.k + kRoutingBlock;
}

struct RoutingKernels {
  void (*route)(const Routing& routing, const float* logits, int64_t tokens, float* scratch, int32_t* indices,
                float* weights);
};

const RoutingKernels* routing_baseline();
const RoutingKernels* routing_avx2();
const RoutingKernels* routing_avx512();

}  // namespace planmill
