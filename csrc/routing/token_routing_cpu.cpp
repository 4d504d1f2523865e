// token_routing on the CPU: tokens in parallel, then, where an expert takes only so many, one exact count per group.
#include "common/torch_headers.h"

#include <numeric>

#include "common/cpu_capability.h"
#include "routing/token_routing.h"

namespace planmill {
namespace {

const RoutingKernels& routing_kernels() {
  return choose_kernels(routing_baseline(), routing_avx2(), routing_avx512());
}

// Tokens first..first + size in the order in which they are served.
std::vector<int64_t> service(const float* weights, int64_t first, int64_t size, int64_t k, bool by_score) {
  std::vector<int64_t> order(static_cast<size_t>(size));
  std::iota(order.begin(), order.end(), first);
  if (!by_score) return order;
  std::vector<float> largest(static_cast<size_t>(size), -INFINITY);
  for (int64_t t = 0; t < size; ++t)
    for (const float* w = weights + (first + t) * k; w < weights + (first + t + 1) * k; ++w)
      largest[t] = *w > largest[t] ? *w : largest[t];  // NaN is not seen
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return largest[a - first] > largest[b - first]; });
  return order;
}

// Drops what is beyond the capacity in groups first..last: all first choices are served before any second.
void drop(int32_t* indices, float* weights, int64_t tokens, int64_t k, int64_t experts, int64_t capacity, int64_t size,
          bool by_score, int64_t first, int64_t last) {
  std::vector<int64_t> used(static_cast<size_t>(experts));
  for (int64_t group = first; group < last; ++group) {
    std::fill(used.begin(), used.end(), 0);
    const auto order = service(weights, group * size, std::min(size, tokens - group * size), k, by_score);
    for (int64_t j = 0; j < k; ++j) {
      for (const int64_t t : order) {
        if (used[indices[t * k + j]]++ < capacity) continue;
        indices[t * k + j] = -1;
        weights[t * k + j] = 0.0f;
      }
    }
  }
}

std::tuple<at::Tensor, at::Tensor> token_routing(const at::Tensor& logits, const at::Tensor& bias, int64_t k,
                                                 c10::string_view score, c10::string_view order, bool renormalize,
                                                 double eps, double scale, int64_t groups, int64_t top_groups,
                                                 bool mask_with_zero, int64_t capacity, int64_t capacity_group,
                                                 c10::string_view capacity_priority) {
  const at::Tensor l = logits.to(at::kFloat).contiguous(), b = bias.contiguous();
  const int64_t tokens = l.size(0), experts = l.size(1);
  at::Tensor indices = at::empty({tokens, k}, at::kInt), weights = at::empty({tokens, k}, at::kFloat);
  if (tokens == 0) return {weights, indices};
  const Routing routing{experts,
                        k,
                        groups,
                        top_groups,
                        b.numel() ? b.const_data_ptr<float>() : nullptr,
                        score == "sigmoid",
                        order == "topk_then_softmax",
                        renormalize,
                        mask_with_zero,
                        static_cast<float>(eps),
                        static_cast<float>(scale)};
  const RoutingKernels& kernels = routing_kernels();
  const float* source = l.const_data_ptr<float>();
  int32_t* chosen = indices.data_ptr<int32_t>();
  float* weight = weights.data_ptr<float>();
  // A token costs about as many cycles as it has experts, and a hundred for each one taken; threads wake up in 10^4.
  const int64_t grain = std::max<int64_t>(1, 40000 / (2 * experts + 100 * k));
  at::parallel_for(0, tokens, grain, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(static_cast<size_t>(routing_scratch(routing)));
    kernels.route(routing, source + first * experts, last - first, scratch.data(), chosen + first * k,
                  weight + first * k);
  });
  if (capacity > 0) {
    const int64_t size = capacity_group > 0 ? std::min(capacity_group, tokens) : tokens;
    at::parallel_for(0, (tokens + size - 1) / size, std::max<int64_t>(1, 10000 / (size * k)),
                     [&](int64_t first, int64_t last) {
                       drop(chosen, weight, tokens, k, experts, capacity, size, capacity_priority == "score", first,
                            last);
                     });
  }
  return {weights, indices};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("token_routing", &token_routing); }

}  // namespace
}  // namespace planmill
