// cluster_members on the CPU: scores of a few tokens against a block of centroids at a time, and for every cluster the
// best tokens so far; what does not beat them is dropped eight scores at a time.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/clusters_of.h"
#include "neighbors/shortlist.h"

namespace planmill {
namespace {

constexpr int64_t kTokens = 64;              // of a tile of scores
constexpr int64_t kMost = 64, kLeast = 16;   // clusters of a block

struct Scored {
  float score;
  int32_t token;
  bool operator<(const Scored& other) const { return score > other.score || (score == other.score && token < other.token); }
};

// Members of clusters [first, first + count) of one head: out [count, window].
void choose(const ClusterKernels& kernels, const HeadRows& x, int64_t tokens, const float* centroids, int64_t count,
            int64_t window, int32_t* out) {
  const int64_t padded = (count + kernels.width - 1) / kernels.width * kernels.width;
  std::vector<float> means(static_cast<size_t>(x.width * padded)), unit(static_cast<size_t>(kTokens * x.width));
  std::vector<float> scores(static_cast<size_t>(kTokens * padded));
  std::vector<float> thresholds(static_cast<size_t>(padded), std::numeric_limits<float>::infinity());
  std::vector<int32_t> columns(static_cast<size_t>(padded));
  std::fill_n(thresholds.begin(), count, std::nanf(""));
  for (int64_t c = 0; c < count; ++c)
    for (int64_t d = 0; d < x.width; ++d) means[static_cast<size_t>(d * padded + c)] = centroids[c * x.width + d];
  std::vector<Best<Scored>> best;
  best.reserve(static_cast<size_t>(count));
  for (int64_t c = 0; c < count; ++c) best.emplace_back(window);
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t here = std::min(kTokens, tokens - first);
    kernels.score(x, first, here, means.data(), padded, unit.data(), scores.data());
    for (int64_t t = 0; t < here; ++t) {
      const float* row = scores.data() + t * padded;
      const int64_t found = kernels.above(row, thresholds.data(), padded, columns.data());
      for (int64_t i = 0; i < found; ++i) {
        const auto c = static_cast<size_t>(columns[static_cast<size_t>(i)]);
        best[c].add({row[c], static_cast<int32_t>(first + t)});
        if (best[c].worst() != nullptr) thresholds[c] = best[c].worst()->score;
      }
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    const auto& members = best[static_cast<size_t>(c)].sorted();
    int32_t* row = out + c * window;
    for (int64_t i = 0; i < window; ++i) row[i] = members[static_cast<size_t>(i)].token;
    std::sort(row, row + window);
  }
}

at::Tensor cluster_members(const at::Tensor& x, const at::Tensor& centroids, int64_t window) {
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), clusters = centroids.size(1);
  at::Tensor out = at::empty({batch, heads, clusters, window}, at::kInt);
  if (out.numel() == 0) return out;
  const at::Tensor rows = with_whole_rows(x), means = centroids.contiguous();
  const ClusterKernels& kernels = cluster_kernels_in_use();
  int64_t block = std::min(kMost, clusters);
  while (block > kLeast && batch * heads * ((clusters + block - 1) / block) < 2 * at::get_num_threads()) block /= 2;
  const int64_t blocks = (clusters + block - 1) / block;
  const float* mean = means.const_data_ptr<float>();
  int32_t* members = out.data_ptr<int32_t>();
  at::parallel_for(0, batch * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, first = i % blocks * block;
      choose(kernels, rows_of_head(rows, head / heads, head % heads), tokens,
             mean + (head % heads * clusters + first) * x.size(3), std::min(block, clusters - first), window,
             members + (head * clusters + first) * window);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("cluster_members", &cluster_members); }

}  // namespace
}  // namespace planmill
