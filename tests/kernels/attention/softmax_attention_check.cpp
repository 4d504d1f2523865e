// softmax_attention of one instruction set against double arithmetic: every number of rows of a slab, blocks that meet,
// views of another order, and a second task that finds its keys packed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "attention/softmax_attention.h"

using namespace planmill;

int main() {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const SoftmaxAttentionKernels& kernels = *KERNELS();
  const int64_t panel = 2 * kernels.width;
  int failed = 0;
  for (const int64_t d : {1, 24})
    for (const int64_t dv : {1, 33})
      for (const int64_t keys : {1, 33, 150})
        for (int64_t queries = 1; queries <= 2 * kernels.slab + 1; queries += queries < kernels.slab ? 1 : kernels.slab)
          for (const bool adjacent : {true, false}) {
            const int64_t block = std::min(keys > 100 ? 2 * panel : 96, (keys + panel - 1) / panel * panel);
            std::vector<float> q(queries * d), k(keys * d), v(keys * dv), y(queries * (dv + 2), NAN);
            for (auto* numbers : {&q, &k, &v})
              for (float& number : *numbers) number = normal(generator);
            const auto rows = [&](const std::vector<float>& x, int64_t n, int64_t channels) {
              return adjacent ? AttentionRows{x.data(), channels, 1} : AttentionRows{x.data(), 1, n};
            };
            const AttentionHead head{rows(q, queries, d), rows(k, keys, d), rows(v, keys, dv), y.data(), dv + 2};
            const int64_t half = (queries + 1) / 2;
            const AttentionShape shape{keys, d, dv, 0.3f, block, half, (dv + panel - 1) / panel * panel};
            std::vector<float> scratch(attention_scratch(shape, kernels.slab), NAN);
            kernels.attend(shape, head, 0, half, false, scratch.data());
            if (half < queries) kernels.attend(shape, head, half, queries, shape.blocks() == 1, scratch.data());
            const auto at = [&](const AttentionRows& x, int64_t n, int64_t c) -> double { return x.data[n * x.row + c * x.channel]; };
            for (int64_t i = 0; i < queries; ++i) {
              std::vector<double> weights(keys);
              double total = 0;
              for (int64_t j = 0; j < keys; ++j) {
                double score = 0;
                for (int64_t c = 0; c < d; ++c) score += at(head.q, i, c) * at(head.k, j, c);
                total += weights[j] = std::exp(static_cast<double>(0.3f) * score);
              }
              for (int64_t c = 0; c < dv; ++c) {
                double sum = 0;
                for (int64_t j = 0; j < keys; ++j) sum += weights[j] / total * at(head.v, j, c);
                failed += !(std::fabs(y[i * (dv + 2) + c] - sum) <= 1e-5);
              }
              for (int64_t c = dv; c < dv + 2; ++c) failed += !std::isnan(y[i * (dv + 2) + c]);  // not ours to write
            }
          }
  std::printf("%d failures\n", failed);
  return failed != 0;
}
