// constrained_search on the CPU. Queries that look into the same ranges of rows go together: each row that one of them may
// match is brought into the cache (and to float32) once, the rows near enough are compared directly. Queries that share
// one long range and have no positions are an ordinary search, which knn answers with its screen.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <string_view>

#include "neighbors/nearest.h"
#include "neighbors/scoring.h"

namespace planmill {
namespace {

constexpr int64_t kGroup = 32;             // queries that walk over rows together
constexpr int64_t kChunkBytes = 128 << 10;  // of rows, for which these queries take turns
constexpr int64_t kManyQueries = 32;       // that share all their rows: from here on the screen of knn pays
constexpr int64_t kManyRows = 512;

struct Range {
  int32_t begin, end;
  bool operator==(const Range&) const = default;
  auto operator<=>(const Range&) const = default;
};

struct Constrained {
  const Rows& queries;
  const Rows& database;
  const double* query_positions;  // [n, p]
  const double* positions;        // [m, p], in the order of `rows`
  const int32_t* rows;            // [m], rows of the database
  const Range* ranges;            // [n, lists], slots of `rows`
  int64_t p, lists, k;
  double square;  // of the radius
  Metric metric;
  bool squared;
  const ScreenKernels& kernels;

  const Range* of(int64_t query) const { return ranges + query * lists; }
  bool alike(int64_t a, int64_t b) const { return std::equal(of(a), of(a) + lists, of(b)); }
  int64_t length(int64_t query) const {
    return std::accumulate(of(query), of(query) + lists, int64_t{0}, [](int64_t sum, Range r) { return sum + r.end - r.begin; });
  }
  // Those of the slots [begin, end) whose position is near enough, relative to `begin`.
  int64_t near(int64_t query, int64_t begin, int64_t end, int32_t* found) const;
};

template <int P>
int64_t slots_within(const double* own, const double* positions, int64_t count, double square, int32_t* found) {
  int64_t kept = 0;
  for (int64_t s = 0; s < count; ++s, positions += P) {
    double sum = 0.0;  // no fused multiply-add in this file: the sum rounds as the definition's does
    for (int c = 0; c < P; ++c) sum += (own[c] - positions[c]) * (own[c] - positions[c]);
    found[kept] = static_cast<int32_t>(s);
    kept += sum <= square;
  }
  return kept;
}

int64_t Constrained::near(int64_t query, int64_t begin, int64_t end, int32_t* found) const {
  const double *own = query_positions + query * p, *first = positions + begin * p;
  switch (p) {
    case 0: return slots_within<0>(own, first, end - begin, square, found);
    case 1: return slots_within<1>(own, first, end - begin, square, found);
    case 2: return slots_within<2>(own, first, end - begin, square, found);
    default: return slots_within<3>(own, first, end - begin, square, found);
  }
}

// Rows of one chunk, in float32, each looked at when the first query needs it.
class Chunk {
 public:
  Chunk(const Constrained& s, int64_t capacity)
      : s_(s), rows_(static_cast<size_t>(capacity)), lengths_(rows_.size()), scratch_(rows_.size() * static_cast<size_t>(s.queries.width())) {}
  void start(int64_t begin, int64_t count) { begin_ = begin, std::fill_n(rows_.begin(), count, nullptr); }
  void fetch(int64_t i) const {
    if (rows_[i] == nullptr) s_.database.fetch(s_.rows[begin_ + i]);
  }
  const float* row(int64_t i) {
    if (rows_[i] == nullptr) {
      const int64_t d = s_.queries.width();
      rows_[i] = s_.database.get(s_.rows[begin_ + i], scratch_.data() + i * d);
      if (s_.metric == Metric::kCosine) lengths_[i] = length_of_row(rows_[i], d);
    }
    return rows_[i];
  }
  double length(int64_t i) const { return lengths_[i]; }
  int32_t index(int64_t i) const { return s_.rows[begin_ + i]; }

 private:
  const Constrained& s_;
  int64_t begin_ = 0;
  std::vector<const float*> rows_;
  std::vector<double> lengths_;
  std::vector<float> scratch_;
};

// One query and the rows of a chunk that it may match.
struct Candidate {
  const float* x;
  double length;
};

void compare(const Constrained& s, const Candidate& q, Chunk& chunk, const int32_t* found, int64_t count, Nearest& nearest) {
  const int64_t d = s.queries.width();
  const float* y[4];
  float values[4];
  for (int64_t first = 0; first < count; first += 4) {
    const int64_t some = std::min<int64_t>(4, count - first);
    for (int64_t j = first + 4; j < std::min(first + 8, count); ++j) chunk.fetch(found[j]);
    for (int64_t j = 0; j < some; ++j) y[j] = chunk.row(found[first + j]);
    (s.metric == Metric::kL2 ? s.kernels.squared_distances : s.kernels.dots)(q.x, y, some, d, values);
    for (int64_t j = 0; j < some; ++j) {
      const int64_t i = found[first + j];
      const float distance = distance_of(s.metric, s.squared, values[j], q.x, y[j], d, q.length * chunk.length(i));
      // only rows that hold NaN or infinity, or an overflow, give such a value
      if (!(std::fabs(distance) < std::numeric_limits<float>::infinity()) && !finite_row(y[j], d)) continue;
      nearest.add({distance, chunk.index(i)});
    }
  }
}

// Queries order[0 .. count), which share their ranges, over part `part` of `parts` of every range.
void walk(const Constrained& s, const int64_t* order, int64_t count, int64_t part, int64_t parts, Nearest* nearest) {
  const int64_t d = s.queries.width(), size = std::clamp<int64_t>(kChunkBytes / (4 * d), 8, 512);
  std::vector<float> own(static_cast<size_t>(count * d));
  std::vector<Candidate> group;
  std::vector<int32_t> found(static_cast<size_t>(size));
  Chunk chunk(s, size);
  for (int64_t i = 0; i < count; ++i) {
    const float* x = s.queries.get(order[i], own.data() + i * d);
    group.push_back({finite_row(x, d) ? x : nullptr, s.metric == Metric::kCosine ? length_of_row(x, d) : 1.0});
  }
  for (int64_t list = 0; list < s.lists; ++list) {
    const Range range = s.of(order[0])[list];
    const int64_t step = (range.end - range.begin + parts - 1) / parts;
    const int64_t stop = std::min<int64_t>(range.begin + (part + 1) * step, range.end);
    for (int64_t begin = range.begin + part * step; begin < stop; begin += size) {
      const int64_t end = std::min(begin + size, stop);
      chunk.start(begin, end - begin);
      for (int64_t i = 0; i < count; ++i)
        if (group[i].x != nullptr)
          compare(s, group[i], chunk, found.data(), s.near(order[i], begin, end, found.data()), nearest[i]);
    }
  }
}

struct Group {
  int64_t first, count;
};

// Groups of `order`, taken by threads as they become free; few groups are cut into parts of their ranges.
void walk_groups(const Constrained& s, const std::vector<int64_t>& order, const std::vector<Group>& groups, float* values,
                 int32_t* indices) {
  const int64_t threads = at::get_num_threads(), count = static_cast<int64_t>(groups.size());
  double work = 0.0;
  for (const Group& g : groups) work += static_cast<double>(g.count * s.length(order[g.first])) * static_cast<double>(s.queries.width());
  const bool alone = threads == 1 || work <= kPlainWork;
  const int64_t parts = alone || count >= 4 * threads ? 1 : (4 * threads + count - 1) / std::max<int64_t>(count, 1);
  std::vector<std::vector<Nearest>> found(static_cast<size_t>(count * parts));
  std::atomic<int64_t> next{0};
  const auto finish = [&](const Group& g, std::vector<Nearest>& lists) {
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t at = order[g.first + i] * s.k;
      write_row(lists[i].sorted(), s.k, s.metric, values + at, indices + at);
    }
  };
  at::parallel_for(0, alone ? 1 : threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1)) < count * parts;) {
      const Group& g = groups[task / parts];
      std::vector<Nearest> lists(static_cast<size_t>(g.count), Nearest(s.k));
      walk(s, order.data() + g.first, g.count, task % parts, parts, lists.data());
      if (parts == 1) finish(g, lists);
      else found[task] = std::move(lists);
    }
  });
  for (int64_t g = 0; parts > 1 && g < count; ++g) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < groups[g].count; ++i)
        for (const Neighbor& neighbor : found[g * parts + part][i].sorted()) found[g * parts][i].add(neighbor);
    finish(groups[g], found[g * parts]);
  }
}

struct Inputs {
  at::Tensor queries, database, rows;
  std::string_view metric;
};

// The queries order[g], all of which may match just the slots of `range`.
void search_all(const Inputs& in, const Constrained& s, const int64_t* order, int64_t count, Range range, float* values,
                int32_t* indices) {
  static const auto knn = c10::Dispatcher::singleton().findSchemaOrThrow("planmill::knn", "")
                              .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t,
                                                                        c10::string_view, bool, bool)>();
  const at::Tensor chosen = at::tensor(at::IntArrayRef(order, count), at::kLong);
  const int64_t length = range.end - range.begin;
  const bool whole = s.rows[range.end - 1] - s.rows[range.begin] + 1 == length;  // they ascend: no gaps
  const at::Tensor rows = whole ? in.database.narrow(0, s.rows[range.begin], length)
                                : in.database.index_select(0, in.rows.narrow(0, range.begin, length));
  const auto [distance, index] = knn.call(in.queries.index_select(0, chosen), rows, s.k, in.metric, false, true);
  const float* value = distance.const_data_ptr<float>();
  const int32_t* local = index.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < s.k; ++j) {
      const int32_t slot = local[i * s.k + j];
      values[order[i] * s.k + j] = value[i * s.k + j];
      indices[order[i] * s.k + j] = slot < 0 ? -1 : s.rows[range.begin + slot];
    }
}

// A range without positions that so many queries share that knn answers them faster.
bool is_plain_search(const Constrained& s, const int64_t* order, int64_t count) {
  if (s.p > 0 || s.lists != 1 || count < kManyQueries) return false;
  const Range range = s.of(order[0])[0];
  return range.end - range.begin >= kManyRows && std::is_sorted(s.rows + range.begin, s.rows + range.end);
}

std::tuple<at::Tensor, at::Tensor> constrained_search(const at::Tensor& queries, const at::Tensor& database,
                                                      const at::Tensor& query_positions, const at::Tensor& positions,
                                                      const at::Tensor& rows, const at::Tensor& ranges, int64_t k,
                                                      double radius, std::string_view metric) {
  const Inputs in{queries.contiguous(), database.contiguous(), rows.contiguous(), metric};
  const at::Tensor own = query_positions.contiguous(), theirs = positions.contiguous(), lists = ranges.contiguous();
  const int64_t n = in.queries.size(0), d = in.queries.size(1);
  at::Tensor values = at::empty({n, k}, at::kFloat), indices = at::empty({n, k}, at::kInt);
  float* value = values.data_ptr<float>();
  int32_t* index = indices.data_ptr<int32_t>();
  const Metric kind = metric == "cosine" ? Metric::kCosine : metric == "dot" ? Metric::kDot : Metric::kL2;
  const Rows left(in.queries, d), right(in.database, d);
  const Constrained s{left, right, own.const_data_ptr<double>(), theirs.const_data_ptr<double>(),
                      in.rows.const_data_ptr<int32_t>(), reinterpret_cast<const Range*>(lists.const_data_ptr<int32_t>()),
                      own.size(1), lists.size(1), k, radius * radius, kind, metric == "l2sq", screen_kernels()};
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const auto [x, y] = std::mismatch(s.of(a), s.of(a) + s.lists, s.of(b));
    return x == s.of(a) + s.lists ? a < b : *x < *y;
  });
  std::vector<Group> groups;
  for (int64_t first = 0, last; first < n; first = last) {
    for (last = first + 1; last < n && s.alike(order[first], order[last]);) ++last;
    if (is_plain_search(s, order.data() + first, last - first)) {
      search_all(in, s, order.data() + first, last - first, s.of(order[first])[0], value, index);
      continue;
    }
    for (int64_t at = first; at < last; at += kGroup) groups.push_back({at, std::min(kGroup, last - at)});
  }
  walk_groups(s, order, groups, value, index);
  return {values, indices};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("constrained_search", &constrained_search); }

}  // namespace
}  // namespace planmill
