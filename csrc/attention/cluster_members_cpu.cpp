// cluster_members on the CPU: scores of a few tokens against a block of centroids at a time, and for every cluster the
// best tokens so far; what does not beat them is dropped eight scores at a time.
#include "common/torch_headers.h"

#include <limits>

#include "attention/clusters_of.h"

namespace planmill {
namespace {

constexpr int64_t kTokens = 64;              // of a tile of scores
constexpr int64_t kMost = 64, kLeast = 16;   // clusters of a block

// The best tokens of one cluster so far, in the order of the tokens, and then those that came since.
struct Candidates {
  std::vector<float> scores;
  std::vector<int32_t> tokens;
  int64_t count = 0;
};

// Members of clusters [first, first + count) of one head: out [count, window].
void choose(const ClusterKernels& kernels, const HeadRows& x, int64_t tokens, const float* centroids, int64_t count,
            int64_t window, int32_t* out) {
  const int64_t padded = (count + kernels.width - 1) / kernels.width * kernels.width;
  std::vector<float> means(static_cast<size_t>(x.width * padded)), unit(static_cast<size_t>(kTokens * x.width));
  std::vector<float> scores(static_cast<size_t>(kTokens * padded));
  std::vector<float> thresholds(static_cast<size_t>(padded), std::numeric_limits<float>::infinity());
  std::vector<int32_t> columns(static_cast<size_t>(padded));
  std::fill_n(thresholds.begin(), count, std::nanf(""));  // until there are enough, every token is kept
  for (int64_t c = 0; c < count; ++c)
    for (int64_t d = 0; d < x.width; ++d) means[static_cast<size_t>(d * padded + c)] = centroids[c * x.width + d];
  const int64_t capacity = 2 * window + kTokens;
  std::vector<Candidates> candidates(static_cast<size_t>(count));
  for (auto& of : candidates) {
    of.scores.resize(static_cast<size_t>(capacity + kernels.width));
    of.tokens.resize(static_cast<size_t>(capacity));
  }
  const auto cut = [&](size_t c) {
    Candidates& of = candidates[c];
    if (of.count <= window) return;
    float floor = std::isnan(thresholds[c]) ? -std::numeric_limits<float>::infinity() : thresholds[c];
    kernels.keep_largest(of.scores.data(), of.tokens.data(), of.count, window, floor);
    of.count = window;
    thresholds[c] = floor;
  };
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t here = std::min(kTokens, tokens - first);
    kernels.score(x, first, here, means.data(), padded, unit.data(), scores.data());
    for (int64_t t = 0; t < here; ++t) {
      const float* row = scores.data() + t * padded;
      const int64_t found = kernels.above(row, thresholds.data(), padded, columns.data());
      for (int64_t i = 0; i < found; ++i) {
        const auto c = static_cast<size_t>(columns[static_cast<size_t>(i)]);
        Candidates& of = candidates[c];
        of.scores[static_cast<size_t>(of.count)] = row[c];
        of.tokens[static_cast<size_t>(of.count)] = static_cast<int32_t>(first + t);
        if (++of.count == capacity) cut(c);
      }
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    cut(static_cast<size_t>(c));
    std::copy_n(candidates[static_cast<size_t>(c)].tokens.begin(), window, out + c * window);
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
