// Checks one ScreenKernels against double arithmetic: every error bound holds, every best row is among the candidates, the
// largest screened value is the one found, and exact work is exact. Built by test_screen.py, with -DKERNELS=screen_<isa>.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "neighbors/screen.h"

using namespace planmill;

namespace {

constexpr float kInf = INFINITY;
int failures = 0;

void expect(bool holds, const char* what, int64_t d, int variant) {
  if (holds) return;
  if (++failures < 20) std::printf("%s fails at d=%lld, data %d\n", what, static_cast<long long>(d), variant);
}

struct Side {
  std::vector<float> x, inv, half, norm, res;
  std::vector<uint32_t> words;
  StatsView view() { return {inv.data(), half.data(), norm.data(), res.data()}; }
};

std::mt19937 source(7);

float draw(int variant) {
  std::normal_distribution<float> normal;
  switch (variant) {
    case 0: return normal(source);
    case 1: return std::floor(3.0f * std::fabs(normal(source)));         // ties
    case 2: return normal(source) * std::pow(10.0f, 2.5f * normal(source));  // a wide range within a row
    case 3: return 1.0f + 1e-3f * normal(source);                        // nearly one direction
    default: return (source() & 1) ? 1.0f : -1.0f;                       // the worst case for integer sums
  }
}

Side make(const ScreenKernels& k, bool left, int64_t rows, int64_t d, int64_t pairs, int variant) {
  const int64_t panel = left ? k.left_panel : k.right_panel, padded = (rows + panel - 1) / panel * panel;
  Side s;
  s.x.resize(rows * d);
  for (float& v : s.x) v = draw(variant);
  if (variant == 3 && rows > 2) std::memcpy(&s.x[d], &s.x[0], d * sizeof(float));  // a duplicate
  s.inv.assign(padded, 0.0f), s.half.assign(padded, kInf), s.norm.assign(padded, 0.0f), s.res.assign(padded, 0.0f);
  s.words.assign(padded * pairs, 0u);
  std::vector<uint32_t> rows_of_panel(panel * pairs);
  std::vector<float> prepared(d);
  for (int64_t i = 0; i < padded; ++i) {
    uint32_t* row = &rows_of_panel[i % panel * pairs];
    std::fill(row, row + pairs, 0u);
    if (i < rows) {
      const float top = k.prepare(&s.x[i * d], d, 1.0f, nullptr, prepared.data());
      float largest = 0.0f;
      for (const float v : prepared) largest = std::max(largest, std::fabs(v));
      expect(top == largest, "prepare", d, variant);
      RowStats stats;
      (left ? k.quantize_left : k.quantize_right)(prepared.data(), d, pairs, false, row, &stats);
      s.inv[i] = stats.inv, s.half[i] = stats.half, s.norm[i] = stats.norm, s.res[i] = stats.res;
    }
    if (i % panel == panel - 1)
      (left ? k.put_left : k.put_right)(rows_of_panel.data(), pairs, &s.words[i / panel * panel * pairs]);
  }
  return s;
}

double dot(const float* a, const float* b, int64_t d) {
  double sum = 0.0;
  for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(a[c]) * b[c];
  return sum;
}

void check(const ScreenKernels& k, int64_t rows, int64_t columns, int64_t d, int variant) {
  const int64_t pairs = k.words(d);
  Side a = make(k, true, rows, d, pairs, variant), b = make(k, false, columns, d, pairs, variant);
  const int64_t ld = static_cast<int64_t>(b.half.size()), padded = static_cast<int64_t>(a.half.size());
  std::vector<float> raw(padded * ld, NAN), bounded, low_left(rows, -3e38f), low_right(ld, -3e38f);
  k.multiply(a.words.data(), b.words.data(), padded / k.left_panel, ld / k.right_panel, pairs, raw.data(), ld);
  bounded = raw;
  k.lower_bounds(bounded.data(), rows, ld, ld, a.view(), b.view(), low_left.data(), low_right.data());
  std::vector<float> top_left(rows, -3e38f), top_right(ld, -3e38f);
  std::vector<float> screened = raw;
  k.maxima(screened.data(), rows, ld, ld, a.view(), b.view(), top_left.data(), top_right.data());
  std::vector<double> best_of_column(columns, -INFINITY);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      const double value = dot(&a.x[r * d], &b.x[c * d], d) - 0.5 * dot(&a.x[r * d], &a.x[r * d], d);
      best_of_column[c] = std::max(best_of_column[c], value);
    }
    expect(low_right[c] <= best_of_column[c], "the lower bound of a column", d, variant);
  }
  for (int64_t r = 0; r < rows; ++r) {
    double best = -INFINITY;
    float screened_best = -3e38f;
    std::vector<double> value(columns);
    for (int64_t c = 0; c < columns; ++c) {
      const double exact = dot(&a.x[r * d], &b.x[c * d], d), half = 0.5 * dot(&b.x[c * d], &b.x[c * d], d);
      const double bound = static_cast<double>(a.res[r]) * b.norm[c] + (static_cast<double>(a.norm[r]) + a.res[r]) * b.res[c];
      const double rounding = 1e-6 * (static_cast<double>(a.norm[r]) * a.norm[r] + static_cast<double>(b.norm[c]) * b.norm[c]);
      expect(std::fabs(exact - bounded[r * ld + c]) <= bound + rounding, "the error bound", d, variant);
      value[c] = exact - half;
      best = std::max(best, value[c]);
      screened_best = std::max(screened_best, bounded[r * ld + c] - b.half[c]);
    }
    expect(low_left[r] <= best, "the lower bound", d, variant);
    expect(std::fabs(top_left[r] - screened_best) <= 1e-6f * (1.0f + std::fabs(screened_best)), "the maximum", d, variant);
    const RowStats own{a.inv[r], a.half[r], a.norm[r], a.res[r]};
    std::vector<int32_t> found(ld), listed(ld);
    std::vector<float> low(ld), high(ld), row(raw.begin() + r * ld, raw.begin() + (r + 1) * ld);
    std::vector<int32_t> others(ld);
    std::vector<float> bounds(ld);
    const Counts counts = k.candidates(&bounded[r * ld], ld, own, b.view(), low_left[r], low_right.data(), found.data(),
                                       others.data(), bounds.data());
    const int64_t count = counts.found;
    for (int64_t c = 0; c < columns; ++c) {
      const double own_value = dot(&a.x[r * d], &b.x[c * d], d) - 0.5 * dot(&a.x[r * d], &a.x[r * d], d);
      if (own_value < best_of_column[c]) continue;
      const bool listed_here = std::find(found.begin(), found.begin() + count, c) != found.begin() + count;
      const auto place = std::find(others.begin(), others.begin() + counts.others, c) - others.begin();
      expect(listed_here || place < counts.others, "candidates of a column", d, variant);
      if (!listed_here && place < counts.others) expect(bounds[place] >= own_value, "the bound of a column", d, variant);
    }
    const int64_t more = k.list_above(row.data(), ld, own, b.view(), true, low_left[r], listed.data(), low.data(), high.data());
    for (int64_t c = 0; c < columns; ++c) {
      if (value[c] < best) continue;
      expect(std::find(found.begin(), found.begin() + count, c) != found.begin() + count, "candidates", d, variant);
      expect(std::find(listed.begin(), listed.begin() + more, c) != listed.begin() + more, "list_above", d, variant);
    }
    std::vector<int32_t> nearest(ld);
    std::vector<float> again(raw.begin() + r * ld, raw.begin() + (r + 1) * ld);
    float threshold = -3e38f, rest;
    const int64_t near = k.list_nearest(again.data(), ld, own, b.view(), &threshold, nearest.data(), &rest);
    expect(threshold <= best, "the threshold of list_nearest", d, variant);
    for (int64_t c = 0; c < columns; ++c) {
      const bool here = std::find(nearest.begin(), nearest.begin() + near, c) != nearest.begin() + near;
      expect(here || (value[c] < best && value[c] <= rest), "list_nearest", d, variant);
    }
    expect(near > 0 && near <= columns && nearest[near - 1] < columns, "the columns of list_nearest", d, variant);
    float none = 3e38f;
    again.assign(raw.begin() + r * ld, raw.begin() + (r + 1) * ld);
    expect(k.list_nearest(again.data(), ld, own, b.view(), &none, nearest.data(), nullptr) == 0, "a threshold from elsewhere", d, variant);
    std::vector<float> groups(ld);
    const std::vector<float> fresh(raw.begin() + r * ld, raw.begin() + (r + 1) * ld);
    const int64_t count_of_groups = k.group_bounds(fresh.data(), ld, own, b.view(), true, groups.data());
    for (int64_t g = 0; g < count_of_groups; ++g) {
      int64_t at_or_above = 0, groups_above = 0;
      for (int64_t c = 0; c < columns; ++c) at_or_above += value[c] >= groups[g];
      for (int64_t other = 0; other < count_of_groups; ++other) groups_above += groups[other] >= groups[g];
      expect(groups[g] <= -2e38f || at_or_above >= groups_above, "group_bounds", d, variant);
    }
    for (int64_t j = 0; j < more; ++j) {
      expect(listed[j] < columns, "padding was listed;", d, variant);
      expect(low[j] <= value[listed[j]] && value[listed[j]] <= high[j], "the interval of list_above", d, variant);
    }
  }
  std::vector<const float*> y;
  for (int64_t c = 0; c < columns; ++c) y.push_back(&b.x[c * d]);
  std::vector<float> out(columns);
  k.squared_distances(&a.x[0], y.data(), columns, d, out.data());
  for (int64_t c = 0; c < columns; ++c) {
    double exact = 0.0;
    for (int64_t i = 0; i < d; ++i) exact += std::pow(static_cast<double>(a.x[i]) - y[c][i], 2);
    expect(std::fabs(out[c] - exact) <= 1e-5 * exact, "squared_distances", d, variant);
  }
}

}  // namespace

int main() {
  const ScreenKernels& k = *KERNELS();
  for (int64_t d : {1, 2, 3, 15, 16, 31, 33, 64, 127, 513, 1024, 1100})
    for (int variant = 0; variant < 5; ++variant) check(k, 2 * k.left_panel + 1, 9 * k.right_panel + 3, d, variant);
  check(k, 1, 1, 7, 0);
  std::printf("%s: %d failures\n", k.name, failures);
  return failures != 0;
}
