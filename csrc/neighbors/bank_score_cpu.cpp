// bank_score and segmented_max on the CPU: the best row of each segment for every query.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "neighbors/scoring.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = -3.0e38f;
constexpr int64_t kColumns = 1024;               // right rows of a block
constexpr int64_t kPackedBytes = int64_t{24} << 20;  // of queries, and of the database, packed at a time

// What a query found in a segment so far.
struct Best {
  float value;    // distance (smaller is better) or inner product (larger is better)
  int32_t index;  // row of the database
};

// Queries against segments of a database. `best` [n, S] starts out as "nothing found" and is updated in place.
struct Search {
  const ScreenKernels& kernels;
  Metric metric;
  bool exact;
  const Rows& queries;
  const Rows& database;
  const std::vector<int64_t>& offsets;
  Best* best;

  int64_t segments() const { return static_cast<int64_t>(offsets.size()) - 1; }
  bool better(float a, float b) const { return metric == Metric::kL2 ? a < b : a > b; }
  void run();
  bool attempt(const Frame& frame);
  bool pack_segments(Packed& right, int64_t first, int64_t last, const Frame& frame, std::vector<int64_t>& slots) const;
  void task(const Block& block, int64_t left_slot, int64_t query, int64_t count, int64_t segment, int64_t right_slot,
            float scale, Workspace& w) const;
};

void Search::run() {
  if (!attempt(frame_of(database, metric, &queries, false))) attempt(frame_of(database, metric, &queries, true));
}

bool Search::pack_segments(Packed& right, int64_t first, int64_t last, const Frame& frame,
                           std::vector<int64_t>& slots) const {
  bool fits = true;
  int64_t slot = 0;
  slots.clear();
  for (int64_t s = first; s < last; ++s) {
    slots.push_back(slot);
    const int64_t count = offsets[s + 1] - offsets[s];
    fits &= right.pack(database, offsets[s], count, frame, metric, true, !exact, slot);
    slot += right.padded(count);
  }
  return fits;
}

// Groups of queries and groups of segments, each packed once per meeting; tasks are (chunk of queries, segment).
bool Search::attempt(const Frame& frame) {
  const int64_t d = queries.width(), row_bytes = 2 * d + 64;
  const int64_t group = std::max<int64_t>(kernels.left_rows, kPackedBytes / row_bytes);
  Packed left(kernels, Packed::Side::kLeft, std::min(group, queries.count()), d);
  const int64_t chunk = even_block(std::min(group, queries.count()), kernels.left_rows, kernels.left_panel, 1);
  for (int64_t first = 0; first < segments();) {
    int64_t last = first, slots_used = 0;
    do slots_used += round_up(offsets[last + 1] - offsets[last], kernels.right_panel), ++last;
    while (last < segments() && (slots_used + round_up(offsets[last + 1] - offsets[last], kernels.right_panel)) * row_bytes <= kPackedBytes);
    Packed right(kernels, Packed::Side::kRight, slots_used, d);
    std::vector<int64_t> slots;
    if (!pack_segments(right, first, last, frame, slots)) return false;
    const Block block{kernels, left, right, queries, database, metric};
    for (int64_t q = 0; q < queries.count(); q += group) {
      const int64_t count = std::min(group, queries.count() - q), chunks = (count + chunk - 1) / chunk;
      if (!left.pack(queries, q, count, frame, metric, metric == Metric::kL2, !exact, 0)) return false;
      at::parallel_for(0, chunks * (last - first), 1, [&](int64_t begin, int64_t end) {
        Workspace w;
        for (int64_t t = begin; t < end; ++t) {
          const int64_t at = t % chunks * chunk, segment = t / chunks;
          task(block, at, q + at, std::min(chunk, count - at), first + segment, slots[segment], frame.scale, w);
        }
      });
    }
    first = last;
  }
  return true;
}

void Search::task(const Block& block, int64_t left_slot, int64_t query, int64_t count, int64_t segment,
                  int64_t right_slot, float scale, Workspace& w) const {
  const int64_t begin = offsets[segment], size = offsets[segment + 1] - begin;
  w.low_left.assign(static_cast<size_t>(count), kLowest);
  for (int64_t c = 0; c < size; c += kColumns) {
    const int64_t columns = std::min(kColumns, size - c);
    if (exact) {
      visit_candidates(block, left_slot, query, count, right_slot + c, begin + c, columns, w.low_left.data(), nullptr, w,
                       [&](int64_t r, const int32_t* found, const float* values, int64_t n) {
                         Best& own = best[(query + r) * segments() + segment];
                         for (int64_t k = 0; k < n; ++k)  // ascending rows: the first of equals stays
                           if (own.index < 0 || better(values[k], own.value))
                             own = {values[k], static_cast<int32_t>(begin + c + found[k])};
                       });
      continue;
    }
    const int64_t padded = block.right.padded(columns);
    w.products.resize(static_cast<size_t>(block.left.padded(count) * padded));
    kernels.multiply(block.left.at(left_slot), block.right.at(right_slot + c), block.left.panels(count),
                     block.right.panels(padded), block.left.pairs(), w.products.data(), padded);
    kernels.maxima(w.products.data(), count, padded, padded, block.left.stats(left_slot), block.right.stats(right_slot + c),
                   w.low_left.data(), nullptr);
  }
  if (exact) return;
  const StatsView left = block.left.stats(left_slot);
  for (int64_t r = 0; r < count; ++r)
    if (left.half[r] < kInfinity && w.low_left[r] > kLowest)
      best[(query + r) * segments() + segment] = {std::sqrt(std::max(0.0f, 2.0f * (left.half[r] - w.low_left[r]))) / scale, 0};
}

at::Tensor bank_score(const at::Tensor& features, const at::Tensor& bank, double low, double high, double radius,
                      int64_t width, bool exact) {
  at::Tensor x = features.contiguous(), b = bank.contiguous();
  const int64_t n = x.size(0), p = x.size(1), m = b.size(0), q = b.size(1), d = x.size(2);
  const ScreenKernels& kernels = screen_kernels();
  const Rows queries(x, d), database(b, d);
  at::Tensor table = at::empty({n, p, m}, at::kFloat);
  float* entries = table.data_ptr<float>();
  std::fill_n(entries, table.numel(), kInfinity);
  const double work = static_cast<double>(n * p) * static_cast<double>(m * q) * static_cast<double>(d);
  if (radius >= 0 || work <= kPlainWork) {
    at::parallel_for(0, n * m, work <= kPlainWork ? n * m : 1, [&](int64_t first, int64_t last) {
      Workspace w;
      for (int64_t t = first; t < last; ++t)
        plain_distances(kernels, queries, t / m, p, database, t % m, q, radius, width, entries + t / m * p * m + t % m, m, w);
    });
    return interval_means(table, low, high, false);
  }
  std::vector<int64_t> offsets(static_cast<size_t>(m + 1));
  for (int64_t j = 0; j <= m; ++j) offsets[j] = j * q;
  std::vector<Best> best(static_cast<size_t>(n * p * m), Best{kInfinity, -1});
  Search{kernels, Metric::kL2, exact, queries, database, offsets, best.data()}.run();
  for (size_t k = 0; k < best.size(); ++k) entries[k] = best[k].value;
  return interval_means(table, low, high, false);
}

std::tuple<at::Tensor, at::Tensor> segmented_max(const at::Tensor& queries, const at::Tensor& database,
                                                 const at::Tensor& offsets) {
  at::Tensor q = queries.contiguous(), x = database.contiguous();
  const at::Tensor bounds = offsets.to(at::kLong).contiguous();
  const std::vector<int64_t> ends(bounds.const_data_ptr<int64_t>(), bounds.const_data_ptr<int64_t>() + bounds.size(0));
  const int64_t n = q.size(0), d = q.size(1), s = static_cast<int64_t>(ends.size()) - 1;
  at::Tensor values = at::empty({n, s}, at::kFloat), indices = at::empty({n, s}, at::kInt);
  std::vector<Best> best(static_cast<size_t>(n * s), Best{-kInfinity, -1});
  if (n > 0 && s > 0 && x.size(0) > 0) {
    const Rows left(q, d), right(x, d);
    Search{screen_kernels(), Metric::kDot, true, left, right, ends, best.data()}.run();
  }
  float* value = values.data_ptr<float>();
  int32_t* index = indices.data_ptr<int32_t>();
  for (size_t k = 0; k < best.size(); ++k) value[k] = best[k].value, index[k] = best[k].index;
  return {values, indices};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) {
  m.impl("bank_score", &bank_score);
  m.impl("segmented_max", &segmented_max);
}

}  // namespace
}  // namespace planmill
