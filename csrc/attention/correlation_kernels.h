// The kernels behind CorrelationKernels, written once over a vector type of common/vec.h.
#pragma once

#include "attention/correlation.h"
#include "common/products.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace planmill {
namespace {

constexpr float kLargestScore = 1.0e38f;  // a difference of two scores stays finite
constexpr int64_t kDepth = 128;           // rows of a panel of keys that stay in the first-level cache

// A tile's scores or weights lie in panels: [panel][row][kPanel]. What is past the last key is NaN, which weighs 0.
template <class V>
struct CorrelationRows {
  using F = typename V::F;
  const CorrelationTile& tile;
  int64_t panels;

  float* row(float* s, int64_t panel, int64_t i) const { return s + (panel * tile.rows + i) * kPanel; }

  void score(const CorrelationMap& map, float* s) const {
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t t = 0; t < map.count; ++t) {
        const CorrelationTerm& term = map.terms[t];
        for (int64_t c = 0; c < term.width; c += kDepth) {
          const int64_t depth = term.width - c < kDepth ? term.width - c : kDepth;
          multiply<V>({term.queries + c, term.width, 1}, term.keys + (p * term.width + c) * kPanel, kPanel, row(s, p, 0),
                      kPanel, tile.rows, depth, kPanel, t > 0 || c > 0);
        }
      }
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t j = tile.keys - (panels - 1) * kPanel; j < kPanel; ++j) row(s, panels - 1, i)[j] = __builtin_nanf("");
  }

  // The highest score of a row; NaN does not count: max gives its second operand.
  float highest(float* s, int64_t i) const {
    F top[4];
    for (int64_t u = 0; u < 4; ++u) top[u] = V::set1(-__builtin_inff());
    for (int64_t p = 0; p < panels; ++p) {
      const float* x = row(s, p, i);
      for (int64_t j = 0; j < kPanel; j += 4 * V::kWidth)
#pragma GCC unroll 4
        for (int64_t u = 0; u < 4; ++u) top[u] = V::max(V::load(x + j + u * V::kWidth), top[u]);
    }
    return V::max_lane(V::max(V::max(top[0], top[1]), V::max(top[2], top[3])));
  }

  bool all_nan(float* s, int64_t i) const {
    for (int64_t j = 0; j < tile.keys; ++j)
      if (!__builtin_isnan(row(s, j / kPanel, i)[j % kPanel])) return false;
    return true;
  }

  // Scores to e^(score - highest), those below the threshold to 0; gives their sum. NaN and -inf become 0.
  template <bool Limited>
  float exponentials(float* s, int64_t i, float top) const {
    const float bounded = top < -kLargestScore ? -kLargestScore : top > kLargestScore ? kLargestScore : top;
    const F shift = V::set1(bounded), threshold = V::set1(tile.threshold), zero = V::zero();
    F sum[2] = {zero, zero};
    for (int64_t p = 0; p < panels; ++p) {
      float* x = row(s, p, i);
      for (int64_t j = 0; j < kPanel; j += 2 * V::kWidth)
#pragma GCC unroll 2
        for (int64_t u = 0; u < 2; ++u) {
          const F score = V::load(x + j + u * V::kWidth);
          F e = exp_below<V>(V::min(zero, V::sub(score, shift)));  // min keeps NaN: it gives its second operand
          if constexpr (Limited) e = V::where_positive(V::sub(threshold, score), zero, e);
          V::store(x + j + u * V::kWidth, e);
          sum[u] = V::add(sum[u], e);
        }
    }
    return V::sum(V::add(sum[0], sum[1]));
  }

  // Weights of row i, but for the factor that it gives.
  float weigh(float* s, int64_t i) const {
    const float top = highest(s, i);
    if (!(top > -__builtin_inff()) && all_nan(s, i)) return __builtin_nanf("");
    if (tile.limited && !(top >= tile.threshold)) {
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t j = 0; j < kPanel; ++j) row(s, p, i)[j] = 0.0f;
      const int64_t own = tile.first + i;
      row(s, own / kPanel, i)[own % kPanel] = 1.0f;
      return tile.threshold == tile.threshold ? 1.0f : __builtin_nanf("");
    }
    const float sum = tile.limited ? exponentials<true>(s, i, top) : exponentials<false>(s, i, top);
    return 1.0f / (sum > 1.0f ? sum : 1.0f);
  }

  // a = a * factor_a + b * factor_b, row i
  void combine(float* a, float factor_a, float* b, float factor_b, int64_t i) const {
    const F fa = V::set1(factor_a), fb = V::set1(factor_b);
    for (int64_t p = 0; p < panels; ++p) {
      float* x = row(a, p, i);
      const float* y = row(b, p, i);
      for (int64_t j = 0; j < kPanel; j += V::kWidth)
        V::store(x + j, V::fma(V::load(y + j), fb, V::mul(V::load(x + j), fa)));
    }
  }

  void mix(float* weights, const float* factors) const {
    const int64_t padded = (tile.value_width + kPanel - 1) / kPanel * kPanel;
    for (int64_t c = 0; c < tile.value_width; c += kPanel) {
      const int64_t left = (tile.value_width - c + V::kWidth - 1) / V::kWidth * V::kWidth;
      const float* values = tile.values + c * panels * kPanel;
      for (int64_t p = 0; p < panels; ++p)
        multiply<V>({row(weights, p, 0), kPanel, 1}, values + p * kPanel * kPanel, kPanel, tile.out + c, padded, tile.rows,
                    kPanel, left < kPanel ? left : kPanel, p > 0);
    }
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t c = 0; c < tile.value_width; c += V::kWidth) {
        float* x = tile.out + i * padded + c;
        V::store(x, V::mul(V::load(x), V::set1(factors[i])));
      }
  }
};

// The weights of all maps are summed before they meet the values: one product for all, where sums of results take one each.
template <class V>
void attend_correlation(const CorrelationTile& tile, float* scratch) {
  const CorrelationRows<V> rows{tile, (tile.keys + kPanel - 1) / kPanel};
  float* more = scratch + rows.panels * tile.rows * kPanel;
  float factors[kCorrelationRows];
  for (int64_t m = 0; m < tile.count; ++m) {
    float* s = m == 0 ? scratch : more;
    rows.score(tile.maps[m], s);
    for (int64_t i = 0; i < tile.rows; ++i) {
      const float factor = rows.weigh(s, i);
      if (m > 0) rows.combine(scratch, factors[i], more, factor, i);
      factors[i] = m > 0 ? 1.0f : factor;
    }
  }
  rows.mix(scratch, factors);
}

template <class V>
constexpr CorrelationKernels correlation_kernels() {
  return {&attend_correlation<V>};
}

}  // namespace
}  // namespace planmill
