// dictionary_lookup on the CPU: keys are packed and screened block by block, each query keeps the atoms that could have a
// weight, and their scores are summed again in double. A query with too many of them, and all where there are few queries,
// is compared with every atom. Either way a weight comes from the same sums in the same order, to the bit.
//
// The screen shifts keys by their mean, which adds the same to all scores of a query and so changes no weight.
#include "common/torch_headers.h"

#include <limits>
#include <string_view>

#include "common/cpu_capability.h"
#include "neighbors/listing.h"
#include "neighbors/lookup.h"
#include "neighbors/scoring.h"
#include "neighbors/simplex.h"

namespace planmill {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();  // the score of an atom that cannot be chosen
constexpr int64_t kPackedRows = 4096;              // keys packed at a time
constexpr int64_t kQueryBytes = int64_t{8} << 20;  // of queries packed at a time
constexpr int64_t kFewQueries = 12;                // below, packing the keys costs more than reading them
constexpr int64_t kScoreBytes = int64_t{8} << 20;  // of scores of queries that are compared with every atom
constexpr int64_t kMostQueries = 64;               // compared with every atom at a time: they stay in the cache
constexpr int64_t kAtoms = 32;                     // that meet all those queries at a time
constexpr int64_t kColumns = 256;                  // of their values

const LookupKernels& lookup_kernels() { return choose_kernels(lookup_baseline(), lookup_avx2(), lookup_avx512()); }

int64_t widened(int64_t d) { return (d + kWidened - 1) / kWidened * kWidened; }

struct Lookup {
  const at::Tensor &queries, &keys, &values;  // float32, contiguous
  double scale;
  int64_t power;
  const ScreenKernels& screen;
  const LookupKernels& kernels;
  float* out;

  int64_t atoms() const { return keys.size(0); }
  int64_t depth() const { return keys.size(1); }
  int64_t width() const { return values.size(1); }
  const float* query(int64_t i) const { return queries.const_data_ptr<float>() + i * depth(); }
  const float* key(int64_t j) const { return keys.const_data_ptr<float>() + j * depth(); }
  const float* value(int64_t j) const { return values.const_data_ptr<float>() + j * width(); }
  float* result(int64_t i) const { return out + i * width(); }

  // Scores [count] to weights in place; the count of weights is not reduced. False if none of the atoms can be chosen.
  bool weigh(double* scores, int64_t count, std::vector<double>& scratch) const;
  // False if a key does not fit the frame. Queries left to `compare_all` are added to `rest`.
  bool run(const Frame& frame, std::vector<int64_t>& rest) const;
  void screen_keys(const Screening& s, int64_t slot, int64_t count, int64_t row, int64_t rows, Support* lists,
                   Workspace& w) const;
  void answer(int64_t i, const std::vector<int32_t>& found, Workspace& w) const;
  void compare_all(const std::vector<int64_t>& rows) const;
  // Scores of `count` widened queries against keys [first, last).
  void score_tile(const double* group, int64_t count, int64_t first, int64_t last, const std::vector<char>& usable,
                  double* scores) const;
  // Columns [first, last) of the results of `count` queries, from the weights of all atoms.
  void mix_columns(float* mixed, int64_t count, int64_t first, int64_t last, const float* weights) const;
  void fill(int64_t i, float x) const { std::fill(result(i), result(i) + width(), x); }
  // A chosen value that is not finite makes its column NaN.
  void finish(int64_t i) const {
    for (float* x = result(i); x < result(i) + width(); ++x) *x += *x - *x;
  }
};

bool Lookup::weigh(double* scores, int64_t count, std::vector<double>& scratch) const {
  const double top = count > 0 ? *std::max_element(scores, scores + count) : kNone;
  if (top == kNone) return false;
  const Simplex simplex(power, kernels);
  const double per_unit = scale / static_cast<double>(power);
  scratch.clear();
  for (int64_t j = 0; j < count; ++j) {
    scores[j] = (scores[j] - top) * per_unit;
    if (scores[j] > -1.0) scratch.push_back(scores[j]);
  }
  const double tau = simplex.threshold(scratch.data(), static_cast<int64_t>(scratch.size()), -1.0);
  for (int64_t j = 0; j < count; ++j) scores[j] = simplex.weight(scores[j], tau);
  return true;
}

void Lookup::answer(int64_t i, const std::vector<int32_t>& found, Workspace& w) const {
  const auto count = static_cast<int64_t>(found.size());
  std::vector<double> scores(found.size()), scratch;
  w.rows.clear();
  for (const int32_t j : found) w.rows.push_back(key(j));
  kernels.dots(query(i), w.rows.data(), count, depth(), scores.data());
  fill(i, 0.0f);
  if (!weigh(scores.data(), count, scratch)) return fill(i, NAN);
  w.rows.clear();
  w.values.clear();
  for (int64_t k = 0; k < count; ++k)
    if (scores[k] > 0.0) w.rows.push_back(value(found[k])), w.values.push_back(static_cast<float>(scores[k]));
  kernels.add_rows(result(i), w.rows.data(), w.values.data(), static_cast<int64_t>(w.rows.size()), width());
  finish(i);
}

void Lookup::screen_keys(const Screening& s, int64_t slot, int64_t count, int64_t row, int64_t rows, Support* lists,
                         Workspace& w) const {
  if (std::all_of(lists, lists + count, [](const Support& list) { return list.abandoned(); })) return;
  for (int64_t c = 0; c < rows; c += kListedColumns)
    list_candidates(s, slot, count, c, std::min(kListedColumns, rows - c), row, true, false, lists, w,
                    [](int64_t, int64_t) { return true; });
  for (int64_t r = 0; r < count; ++r) lists[r].check_length();
}

bool Lookup::run(const Frame& frame, std::vector<int64_t>& rest) const {
  const int64_t n = queries.size(0), m = atoms(), d = depth();
  const Rows left_rows(queries, d), right_rows(keys, d);
  const int64_t group = std::min(n, std::max(screen.left_rows, kQueryBytes / (2 * d + 64)));
  const int64_t chunk = even_block(group, screen.left_rows, screen.left_panel, at::get_num_threads());
  Packed left(screen, Packed::Side::kLeft, group, d);
  Packed right(screen, Packed::Side::kRight, std::min(kPackedRows, m), d);
  const Screening screening{screen, frame, Metric::kDot, left, right, left_rows, right_rows};
  const double per_unit = static_cast<double>(power) * frame.scale / scale;
  for (int64_t first = 0; first < n; first += group) {
    const int64_t count = std::min(group, n - first), chunks = (count + chunk - 1) / chunk;
    if (!left.pack(left_rows, first, count, frame, Metric::kDot, false, false, 0)) return false;
    std::vector<Support> lists;
    for (int64_t i = 0; i < count; ++i)
      lists.emplace_back(Simplex(power, kernels), per_unit * scale_of_row(query(first + i), d), std::max<int64_t>(256, m / 8));
    for (int64_t row = 0; row < m; row += kPackedRows) {
      const int64_t rows = std::min(kPackedRows, m - row);
      if (!right.pack(right_rows, row, rows, frame, Metric::kDot, true, false, 0)) return false;
      at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Workspace w;
        for (int64_t c = begin; c < end; ++c)
          screen_keys(screening, c * chunk, std::min(chunk, count - c * chunk), row, rows, lists.data() + c * chunk, w);
      });
    }
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Workspace w;
      for (int64_t i = begin; i < end; ++i) {
        const std::vector<int32_t>& found = lists[i].atoms();
        if (!left.valid(i)) fill(first + i, NAN);
        else if (!lists[i].abandoned()) answer(first + i, found, w);
      }
    });
    for (int64_t i = 0; i < count; ++i)
      if (left.valid(i) && lists[i].abandoned()) rest.push_back(first + i);
  }
  return true;
}

void Lookup::score_tile(const double* group, int64_t count, int64_t first, int64_t last, const std::vector<char>& usable,
                        double* scores) const {
  double found[4 * kMostQueries];
  for (int64_t j = first; j < last; j += 4) {  // four keys stay in the first-level cache
    const int64_t some = std::min<int64_t>(4, last - j);
    const float* four[4];
    for (int64_t k = 0; k < 4; ++k) four[k] = key(j + std::min(k, some - 1));
    kernels.four_rows(group, widened(depth()), count, four, depth(), found);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < some; ++k) scores[r * atoms() + j + k] = usable[j + k] ? found[4 * r + k] : kNone;
  }
}

void Lookup::mix_columns(float* mixed, int64_t count, int64_t first, int64_t last, const float* weights) const {
  const float* chosen[kAtoms];
  float weight[kAtoms];
  const int64_t m = atoms(), columns = last - first;
  for (int64_t atom = 0; atom < m; atom += kAtoms) {
    const int64_t some = std::min(kAtoms, m - atom);
    int64_t used = 0;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < some; ++j) used += weights[r * m + atom + j] > 0.0f;
    bool dense = 4 * used > count * some;
    for (int64_t j = 0; j < some && dense; ++j) dense = finite_row(value(atom + j) + first, columns);  // 0 times NaN
    if (dense) {
      kernels.add_products(mixed + first, width(), value(atom) + first, width(), weights + atom, m, count, some, columns);
      continue;
    }
    for (int64_t r = 0; r < count && used > 0; ++r) {
      int64_t own = 0;
      for (int64_t j = 0; j < some; ++j)
        if (const float w = weights[r * m + atom + j]; w > 0.0f) {
          chosen[own] = value(atom + j) + first;
          weight[own++] = w;
        }
      kernels.add_rows(mixed + r * width() + first, chosen, weight, own, columns);
    }
  }
}

void Lookup::compare_all(const std::vector<int64_t>& rows) const {
  const int64_t m = atoms(), n = static_cast<int64_t>(rows.size()), d = depth(), padded = widened(d);
  const int64_t most = std::min(n, std::clamp<int64_t>(kScoreBytes / (8 * m), 1, kMostQueries));
  const auto buffer = [](int64_t size, auto zero) { return std::vector<decltype(zero)>(static_cast<size_t>(size), zero); };
  auto scores = buffer(most * m, 0.0), wide = buffer(most * padded, 0.0);
  auto weights = buffer(most * m, 0.0f), mixed = buffer(most * width(), 0.0f);
  std::vector<char> usable(static_cast<size_t>(m));
  at::parallel_for(0, n > 0 ? m : 0, std::max<int64_t>(1, 32768 / d), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) usable[j] = finite_row(key(j), d);
  });
  const int64_t tiles = (m + kAtoms - 1) / kAtoms, columns = (width() + kColumns - 1) / kColumns;
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = std::min(most, n - first);
    const int64_t* group = rows.data() + first;
    for (int64_t r = 0; r < count; ++r) std::copy(query(group[r]), query(group[r]) + d, wide.begin() + r * padded);
    at::parallel_for(0, tiles, std::max<int64_t>(1, 16384 / (kAtoms * count * d)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        score_tile(wide.data(), count, t * kAtoms, std::min((t + 1) * kAtoms, m), usable, scores.data());
    });
    at::parallel_for(0, count, std::max<int64_t>(1, 4096 / m), [&](int64_t begin, int64_t end) {
      std::vector<double> scratch;
      for (int64_t r = begin; r < end; ++r) {
        double* own = scores.data() + r * m;
        const bool known = finite_row(query(group[r]), d) && weigh(own, m, scratch);
        for (int64_t j = 0; j < m; ++j) weights[r * m + j] = known ? static_cast<float>(own[j]) : 0.0f;
        std::fill_n(mixed.begin() + r * width(), width(), known ? 0.0f : NAN);
      }
    });
    // The values of some atoms serve all queries of a part while they are in the cache.
    const int64_t parts = std::min<int64_t>(count, columns < at::get_num_threads() ? at::get_num_threads() : 1);
    const int64_t part = (count + parts - 1) / parts;
    at::parallel_for(0, parts * columns, std::max<int64_t>(1, 16384 / (part * m)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t r = t / columns * part, c = t % columns * kColumns;
        if (r < count)
          mix_columns(mixed.data() + r * width(), std::min(part, count - r), c, std::min(c + kColumns, width()),
                      weights.data() + r * m);
      }
    });
    for (int64_t r = 0; r < count; ++r) {
      std::copy_n(mixed.begin() + r * width(), width(), result(group[r]));
      finish(group[r]);
    }
  }
}

at::Tensor dictionary_lookup(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, double scale,
                             std::string_view weighting) {
  const auto plain = [](const at::Tensor& x) { return x.to(at::kFloat).contiguous(); };
  const at::Tensor q = plain(queries), k = plain(keys), v = plain(values);
  const int64_t n = q.size(0), m = k.size(0), d = q.size(1);
  at::Tensor out = at::empty({n, v.size(1)}, at::kFloat);
  if (out.numel() == 0) return out.to(values.scalar_type());
  const Lookup lookup{q, k, v, scale, weighting == "sparsemax" ? 1 : 2, screen_kernels(), lookup_kernels(), out.data_ptr<float>()};
  std::vector<int64_t> rest;
  if (n < kFewQueries || static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(d) <= kPlainWork) {
    for (int64_t i = 0; i < n; ++i) rest.push_back(i);
  } else {
    const Rows rows(k, d);
    if (!lookup.run(frame_of(rows, Metric::kDot, nullptr, false), rest)) {
      rest.clear();
      lookup.run(frame_of(rows, Metric::kDot, nullptr, true), rest);
    }
  }
  lookup.compare_all(rest);
  return out.to(values.scalar_type());
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("dictionary_lookup", &dictionary_lookup); }

}  // namespace
}  // namespace planmill
