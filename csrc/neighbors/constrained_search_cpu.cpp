// constrained_search on the CPU. Queries that look into the same ranges of rows go together. Where few of these rows are
// within the radius, each row that one of them may match is brought into the cache (and to float32) once, and compared
// directly. Where many are, all are screened in 16 bits, and only rows that could win are asked for their position. Queries
// that share one long range and have no positions are an ordinary search, which knn answers.
#include "common/torch_headers.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/tensor.h>

#include <atomic>
#include <numeric>
#include <string_view>

#include "neighbors/listing.h"
#include "neighbors/nearest.h"
#include "neighbors/scoring.h"

namespace planmill {
namespace {

constexpr int64_t kGroup = 32;              // queries that walk over rows together
constexpr int64_t kChunkBytes = 128 << 10;  // of rows, for which these queries take turns
constexpr int64_t kScreened = 512;          // queries that are screened together
constexpr int64_t kMany = 32;               // queries that share their rows: from here on the screen of knn pays
constexpr int64_t kManyRows = 512;

struct Range {
  int32_t begin, end;
  bool operator==(const Range&) const = default;
  auto operator<=>(const Range&) const = default;
};

struct Constrained {
  const at::Tensor &query_rows, &database_rows;
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
    return std::accumulate(of(query), of(query) + lists, int64_t{0},
                           [](int64_t sum, Range range) { return sum + range.end - range.begin; });
  }
  bool is_near(int64_t query, int64_t slot) const {
    int32_t found;
    return near(query, slot, slot + 1, &found) > 0;
  }
  // The share of some pairs that is within the radius.
  double share_near(const int64_t* order, int64_t count) const;
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

double Constrained::share_near(const int64_t* order, int64_t count) const {
  constexpr int64_t kSample = 16;
  int64_t seen = 0, kept = 0;
  for (int64_t list = 0; list < lists; ++list) {
    const Range range = of(order[0])[list];
    const int64_t size = range.end - range.begin, some = std::min(size, kSample);
    for (int64_t i = 0; i < some; ++i)
      for (int64_t j = 0; j < kSample; ++j, ++seen)
        kept += is_near(order[j * count / kSample], range.begin + i * size / some);
  }
  return seen > 0 ? static_cast<double>(kept) / static_cast<double>(seen) : 0.0;
}

// Some rows in float32, each looked at when the first query needs it.
class Chunk {
 public:
  Chunk(const Constrained& s, int64_t capacity) : s_(s), rows_(static_cast<size_t>(capacity)), lengths_(rows_.size()) {
    if (s.database_rows.scalar_type() != at::kFloat) scratch_.resize(rows_.size() * static_cast<size_t>(s.queries.width()));
  }
  void start(const int32_t* index, int64_t count) { index_ = index, std::fill_n(rows_.begin(), count, nullptr); }
  void fetch(int64_t i) const {
    if (rows_[i] == nullptr) s_.database.fetch(index_[i]);
  }
  const float* row(int64_t i) {
    if (rows_[i] == nullptr) {
      const int64_t d = s_.queries.width();
      rows_[i] = s_.database.get(index_[i], scratch_.data() + (scratch_.empty() ? 0 : i * d));
      if (s_.metric == Metric::kCosine) lengths_[i] = length_of_row(rows_[i], d);
    }
    return rows_[i];
  }
  double length(int64_t i) const { return lengths_[i]; }
  int32_t index(int64_t i) const { return index_[i]; }

 private:
  const Constrained& s_;
  const int32_t* index_ = nullptr;
  std::vector<const float*> rows_;
  std::vector<double> lengths_;
  std::vector<float> scratch_;
};

int64_t chunk_size(const Constrained& s) { return std::clamp<int64_t>(kChunkBytes / (4 * s.queries.width()), 8, 512); }

struct Own {  // a query; null where it holds NaN or infinity
  const float* x;
  double length;
};

Own own_row(const Constrained& s, int64_t query, float* scratch) {
  const float* x = s.queries.get(query, scratch);
  const int64_t d = s.queries.width();
  return {finite_row(x, d) ? x : nullptr, s.metric == Metric::kCosine ? length_of_row(x, d) : 1.0};
}

// One query and the rows `found` of a chunk.
void compare(const Constrained& s, const Own& q, Chunk& chunk, const int32_t* found, int64_t count, Nearest& nearest) {
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

// Part `part` of `parts` of a range.
Range part_of(Range range, int64_t part, int64_t parts) {
  const int64_t step = (range.end - range.begin + parts - 1) / parts;
  const auto at = [&](int64_t i) { return static_cast<int32_t>(std::min<int64_t>(range.begin + i * step, range.end)); };
  return {at(part), at(part + 1)};
}

// Queries order[0 .. count), which share their ranges, over part `part` of `parts` of every range.
void walk(const Constrained& s, const int64_t* order, int64_t count, int64_t part, int64_t parts, Nearest* nearest) {
  const int64_t d = s.queries.width(), size = chunk_size(s);
  std::vector<float> scratch(static_cast<size_t>(count * d));
  std::vector<Own> group;
  std::vector<int32_t> found(static_cast<size_t>(size));
  Chunk chunk(s, size);
  for (int64_t i = 0; i < count; ++i) group.push_back(own_row(s, order[i], scratch.data() + i * d));
  for (int64_t list = 0; list < s.lists; ++list) {
    const Range range = part_of(s.of(order[0])[list], part, parts);
    for (int64_t begin = range.begin; begin < range.end; begin += size) {
      const int64_t end = std::min<int64_t>(begin + size, range.end);
      chunk.start(s.rows + begin, end - begin);
      for (int64_t i = 0; i < count; ++i)
        if (group[i].x != nullptr)
          compare(s, group[i], chunk, found.data(), s.near(order[i], begin, end, found.data()), nearest[i]);
    }
  }
}

// The same through the screen. False, with nothing done, if a row does not fit the frame.
bool screen(const Constrained& s, const Frame& frame, const int64_t* order, int64_t count, int64_t part, int64_t parts,
            Nearest* nearest) {
  const int64_t d = s.queries.width(), size = chunk_size(s);
  const std::vector<int32_t> chosen(order, order + count);
  const Rows own(s.query_rows, d, chosen.data(), count);
  Packed left(s.kernels, Packed::Side::kLeft, count, d), right(s.kernels, Packed::Side::kRight, kListedColumns, d);
  std::vector<Candidates> lists(static_cast<size_t>(count), Candidates(s.k));
  Workspace w;
  if (!left.pack(own, 0, count, frame, s.metric, s.metric == Metric::kL2, false, 0)) return false;
  const int64_t block = even_block(count, s.kernels.left_rows, s.kernels.left_panel, 1);
  for (int64_t list = 0; list < s.lists; ++list) {
    const Range range = part_of(s.of(order[0])[list], part, parts);
    for (int64_t begin = range.begin; begin < range.end; begin += kListedColumns) {
      const int64_t columns = std::min<int64_t>(kListedColumns, range.end - begin);
      const Rows rows(s.database_rows, d, s.rows + begin, columns);
      if (!right.pack(rows, 0, columns, frame, s.metric, true, false, 0)) return false;
      const Screening screening{s.kernels, frame, s.metric, left, right, own, rows};
      for (int64_t at = 0; at < count; at += block)  // any row of a block may be too far away: no bound from the block alone
        list_candidates(screening, at, std::min(block, count - at), 0, columns, begin, true, columns, lists.data() + at, w,
                        [&](int64_t r, int64_t slot) { return s.is_near(order[at + r], slot); });
    }
  }
  Chunk chunk(s, size);
  std::vector<float> scratch(static_cast<size_t>(d));
  std::vector<int32_t> slots, all(static_cast<size_t>(size));
  std::iota(all.begin(), all.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    if (!left.valid(i)) continue;
    lists[i].cut();
    lists[i].rows(slots);
    for (int32_t& slot : slots) slot = s.rows[slot];
    const Own q = own_row(s, order[i], scratch.data());
    for (int64_t at = 0; at < static_cast<int64_t>(slots.size()); at += size) {
      const int64_t some = std::min<int64_t>(size, static_cast<int64_t>(slots.size()) - at);
      chunk.start(slots.data() + at, some);
      compare(s, q, chunk, all.data(), some, nearest[i]);
    }
  }
  return true;
}

struct Group {
  int64_t first, count;
  bool dense;
};

// Groups of `order`, taken by threads as they become free; few groups are cut into parts of their ranges.
void walk_groups(const Constrained& s, const std::vector<int64_t>& order, const std::vector<Group>& groups, float* values,
                 int32_t* indices) {
  const int64_t threads = at::get_num_threads(), count = static_cast<int64_t>(groups.size());
  double work = 0.0;
  for (const Group& g : groups) work += static_cast<double>(g.count * s.length(order[g.first]));
  work *= static_cast<double>(s.queries.width());
  const bool alone = threads == 1 || work <= kPlainWork;
  const bool dense = std::any_of(groups.begin(), groups.end(), [](const Group& g) { return g.dense; });
  const Frame frame = dense ? frame_of(s.database, s.metric, &s.queries, false) : Frame{};
  const int64_t parts = alone || count >= 4 * threads ? 1 : (4 * threads + count - 1) / std::max<int64_t>(count, 1);
  std::vector<std::vector<Nearest>> found(static_cast<size_t>(count * parts));
  const auto finish = [&](const Group& g, std::vector<Nearest>& lists) {
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t at = order[g.first + i] * s.k;
      write_row(lists[i].sorted(), s.k, s.metric, values + at, indices + at);
    }
  };
  std::atomic<int64_t> next{0};
  at::parallel_for(0, alone ? 1 : threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1)) < count * parts;) {
      const Group& g = groups[task / parts];
      const int64_t* own = order.data() + g.first;
      std::vector<Nearest> lists(static_cast<size_t>(g.count), Nearest(s.k));
      if (!g.dense || !screen(s, frame, own, g.count, task % parts, parts, lists.data()))
        for (int64_t at = 0; at < g.count; at += kGroup)
          walk(s, own + at, std::min(kGroup, g.count - at), task % parts, parts, lists.data() + at);
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

// Queries that may match just the slots of `range`, and all of them.
void search_all(const Constrained& s, const at::Tensor& slots, std::string_view metric, const int64_t* order, int64_t count,
                Range range, float* values, int32_t* indices) {
  static const auto knn = c10::Dispatcher::singleton().findSchemaOrThrow("planmill::knn", "")
                              .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t,
                                                                        c10::string_view, bool, bool)>();
  const at::Tensor chosen = at::tensor(at::IntArrayRef(order, count), at::kLong);
  const int64_t length = range.end - range.begin;
  const bool whole = s.rows[range.end - 1] - s.rows[range.begin] + 1 == length;  // they ascend: no gaps
  const at::Tensor rows = whole ? s.database_rows.narrow(0, s.rows[range.begin], length)
                                : s.database_rows.index_select(0, slots.narrow(0, range.begin, length));
  const auto [distance, index] = knn.call(s.query_rows.index_select(0, chosen), rows, s.k, metric, false, true);
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
  if (s.p > 0 || s.lists != 1 || count < kMany) return false;
  const Range range = s.of(order[0])[0];
  return range.end - range.begin >= kManyRows && std::is_sorted(s.rows + range.begin, s.rows + range.end);
}

// Whether the screen of all pairs costs less than the comparison of the near ones: it is about six times as fast a pair,
// and packs the rows first, which costs about as much as comparing each with five queries.
bool is_dense(const Constrained& s, const int64_t* order, int64_t count) {
  const int64_t length = s.length(order[0]);
  if (count < kMany || length < kManyRows || length < 16 * s.k) return false;
  const auto queries = static_cast<double>(std::min(count, kScreened));
  return queries * s.share_near(order, count) > queries / 6.0 + 5.0;
}

std::tuple<at::Tensor, at::Tensor> constrained_search(const at::Tensor& queries, const at::Tensor& database,
                                                      const at::Tensor& query_positions, const at::Tensor& positions,
                                                      const at::Tensor& rows, const at::Tensor& ranges, int64_t k,
                                                      double radius, std::string_view metric) {
  const at::Tensor q = queries.contiguous(), x = database.contiguous(), slots = rows.contiguous();
  const at::Tensor own = query_positions.contiguous(), theirs = positions.contiguous(), lists = ranges.contiguous();
  const int64_t n = q.size(0), d = q.size(1);
  at::Tensor values = at::empty({n, k}, at::kFloat), indices = at::empty({n, k}, at::kInt);
  float* value = values.data_ptr<float>();
  int32_t* index = indices.data_ptr<int32_t>();
  const Metric kind = metric == "cosine" ? Metric::kCosine : metric == "dot" ? Metric::kDot : Metric::kL2;
  const Rows left(q, d), right(x, d);
  const Constrained s{q, x, left, right, own.const_data_ptr<double>(), theirs.const_data_ptr<double>(),
                      slots.const_data_ptr<int32_t>(), reinterpret_cast<const Range*>(lists.const_data_ptr<int32_t>()),
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
    const int64_t* run = order.data() + first;
    if (is_plain_search(s, run, last - first)) {
      search_all(s, slots, metric, run, last - first, s.of(*run)[0], value, index);
      continue;
    }
    const bool dense = is_dense(s, run, last - first);
    const int64_t size = dense ? kScreened : kGroup;
    for (int64_t at = first; at < last; at += size) groups.push_back({at, std::min(size, last - at), dense});
  }
  walk_groups(s, order, groups, value, index);
  return {values, indices};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("constrained_search", &constrained_search); }

}  // namespace
}  // namespace planmill
