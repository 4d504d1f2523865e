// knn on the CPU: the database is packed and screened block by block, each query keeps the rows that could be among its k
// nearest, and these are evaluated again in float32. The screen is in bytes where k rows of many are looked for; queries
// to which too many rows look alike in bytes are screened again in 16 bits.
#include "common/torch_headers.h"

#include <ATen/ops/tensor.h>

#include <bit>
#include <limits>
#include <numeric>
#include <string_view>

#include "neighbors/listing.h"
#include "neighbors/nearest.h"
#include "neighbors/scoring.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPackedRows = 4096;                // right rows packed at a time
constexpr int64_t kQueryBytes = int64_t{8} << 20;    // of queries packed at a time
constexpr int64_t kFewQueries = 12;                  // below, packing the database costs more than reading it
constexpr int64_t kCoarseRows = 64;                  // rows per neighbour from which on bytes tell them apart

struct Query {
  const Rows& queries;
  const Rows& database;
  int64_t k;
  Metric metric;
  bool squared, exclude_self;
  const ScreenKernels& kernels;

  // Distances of query x (row i) to the rows `index` of the database, as the caller wants them but for the sign of kDot.
  void evaluate(const float* x, const int32_t* index, int64_t count, Neighbor* out, Workspace& w) const;
};

void Query::evaluate(const float* x, const int32_t* index, int64_t count, Neighbor* out, Workspace& w) const {
  const int64_t d = queries.width();
  w.scratch_rows.resize(static_cast<size_t>(4 * d));
  const float* rows[4];
  float values[4];
  const double own = metric == Metric::kCosine ? length_of_row(x, d) : 1.0;
  for (int64_t first = 0; first < count; first += 4) {
    const int64_t some = std::min<int64_t>(4, count - first);
    for (int64_t j = 0; j < some; ++j) rows[j] = database.get(index[first + j], w.scratch_rows.data() + j * d);
    (metric == Metric::kL2 ? kernels.squared_distances : kernels.dots)(x, rows, some, d, values);
    for (int64_t j = 0; j < some; ++j) {
      const double lengths = metric == Metric::kCosine ? own * database.length(index[first + j], rows[j]) : 1.0;
      out[first + j] = {distance_of(metric, squared, values[j], x, rows[j], d, lengths), index[first + j]};
    }
  }
}

// Few queries: every row of the database is read once and compared with all of them.
void scan_database(const Query& q, float* values, int32_t* indices) {
  const int64_t n = q.queries.count(), m = q.database.count(), d = q.queries.width();
  const double work = static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(d);
  const int64_t parts = work > kPlainWork ? at::get_num_threads() : 1, size = (m + parts - 1) / std::max<int64_t>(parts, 1);
  std::vector<Nearest> nearest(static_cast<size_t>(n * parts), Nearest(q.k));
  std::vector<float> own(static_cast<size_t>(n * d));
  std::vector<const float*> x(static_cast<size_t>(n));
  std::vector<char> usable(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    x[i] = q.queries.get(i, own.data() + i * d);
    usable[i] = finite_row(x[i], d);
  }
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Workspace w;
    std::vector<float> scratch(static_cast<size_t>(d));
    for (int64_t part = begin; part < end; ++part) {
      int32_t index[4];
      Neighbor found[4];
      const int64_t stop = std::min((part + 1) * size, m);
      for (int64_t row = part * size; row < stop;) {
        const int64_t count = std::min<int64_t>(4, stop - row);
        for (int64_t j = 0; j < count; ++j) index[j] = static_cast<int32_t>(row + j);
        for (int64_t i = 0; i < n; ++i) {
          if (!usable[i]) continue;
          q.evaluate(x[i], index, count, found, w);
          for (int64_t j = 0; j < count; ++j) {
            if (q.exclude_self && index[j] == i) continue;
            // only rows that hold NaN or infinity, or an overflow, give such a value
            if (!(std::fabs(found[j].distance) < kInfinity) &&
                !finite_row(q.database.get(index[j], scratch.data()), d))
              continue;
            nearest[i * parts + part].add(found[j]);
          }
        }
        row += count;
      }
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    Nearest& all = nearest[i * parts];
    for (int64_t part = 1; part < parts; ++part)
      for (const Neighbor& neighbor : nearest[i * parts + part].sorted()) all.add(neighbor);
    write_row(all.sorted(), q.k, q.metric, values + i * q.k, indices + i * q.k);
  }
}

struct Screen {
  const Query& q;
  const Frame& frame;
  const ScreenKernels& kernels;
  bool exact;
  const int64_t* positions;  // of the queries among all queries; null: as they are
  int64_t listed, evaluated;  // rows of a query; with more, it is left to a finer screen
  bool sharp;  // the best rows are looked at in between

  // False if a row does not fit the frame. The queries that were not answered are added to `unanswered`.
  bool run(float* values, int32_t* indices, std::vector<int64_t>& unanswered) const;
  void screen(const Screening& s, int64_t slot, int64_t query, int64_t count, int64_t row, int64_t rows,
              Candidates* lists, Workspace& w) const;
  int64_t position(int64_t i) const { return positions == nullptr ? i : positions[i]; }
};

bool Screen::run(float* values, int32_t* indices, std::vector<int64_t>& unanswered) const {
  const int64_t n = q.queries.count(), m = q.database.count(), d = q.queries.width();
  const int64_t group = std::min(n, std::max(kernels.left_rows, kQueryBytes / (2 * d + 64)));
  const int64_t chunk = even_block(group, kernels.left_rows, kernels.left_panel, at::get_num_threads());
  Packed left(kernels, Packed::Side::kLeft, group, d);
  Packed right(kernels, Packed::Side::kRight, std::min(kPackedRows, m), d);
  const Screening screening{kernels, frame, q.metric, left, right, q.queries, q.database};
  for (int64_t first = 0; first < n; first += group) {
    const int64_t count = std::min(group, n - first), chunks = (count + chunk - 1) / chunk;
    if (!left.pack(q.queries, first, count, frame, q.metric, q.metric == Metric::kL2, false, 0)) return false;
    std::vector<Candidates> lists(static_cast<size_t>(count), Candidates(q.k, listed));
    for (int64_t row = 0; row < m; row += kPackedRows) {
      const int64_t rows = std::min(kPackedRows, m - row);
      if (!right.pack(q.database, row, rows, frame, q.metric, true, false, 0)) return false;
      at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Workspace w;
        for (int64_t c = begin; c < end; ++c)
          screen(screening, c * chunk, first + c * chunk, std::min(chunk, count - c * chunk), row, rows,
                 lists.data() + c * chunk, w);
      });
    }
    std::vector<char> answered(static_cast<size_t>(count), 1);
    std::vector<int32_t> order(static_cast<size_t>(count)), lowest(static_cast<size_t>(count), 0);
    std::iota(order.begin(), order.end(), 0);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Workspace w;
      std::vector<int32_t> rows;
      for (int64_t i = begin; i < end; ++i) {
        if (sharp && left.valid(i)) screening.sharpen(first + i, lists[i], w);
        else lists[i].cut();
        answered[i] = !lists[i].abandoned() && lists[i].size() <= evaluated;
        lists[i].rows(rows);
        if (!rows.empty()) lowest[i] = *std::min_element(rows.begin(), rows.end());
      }
    });
    // Queries that look alike share most of their rows: one after the other, they find them in cache.
    std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return lowest[i] < lowest[j]; });
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Workspace w;
      std::vector<float> scratch(static_cast<size_t>(d));
      std::vector<Neighbor> found;
      std::vector<int32_t> rows;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t i = order[at];
        if (!answered[i]) continue;
        lists[i].rows(rows);
        found.resize(rows.size());
        q.evaluate(q.queries.get(first + i, scratch.data()), rows.data(), static_cast<int64_t>(rows.size()), found.data(), w);
        const auto kept = std::min<int64_t>(q.k, static_cast<int64_t>(found.size()));
        std::partial_sort(found.begin(), found.begin() + kept, found.end());
        found.resize(static_cast<size_t>(kept));
        const int64_t out = position(first + i) * q.k;
        write_row(found, q.k, q.metric, values + out, indices + out);
      }
    });
    for (int64_t i = 0; i < count; ++i)
      if (!answered[i]) unanswered.push_back(first + i);
  }
  return true;
}

void Screen::screen(const Screening& s, int64_t slot, int64_t query, int64_t count, int64_t row, int64_t rows,
                    Candidates* lists, Workspace& w) const {
  if (std::all_of(lists, lists + count, [](const Candidates& list) { return list.abandoned(); })) return;
  for (int64_t c = 0; c < rows; c += kListedColumns) {
    list_candidates(s, slot, count, c, std::min(kListedColumns, rows - c), row, exact, q.exclude_self, lists, w,
                    [&](int64_t r, int64_t index) { return !(q.exclude_self && index == position(query + r)); });
    if (sharp && std::has_single_bit(static_cast<uint64_t>((row + c) / kListedColumns + 1)))  // twice the rows of last time
      for (int64_t r = 0; r < count; ++r)
        if (s.left.valid(slot + r)) s.sharpen(query + r, lists[r], w);
  }
}

// Bytes first where they may pay, then 16 bits for the queries that they could not answer. False if a row does not fit the
// frame, which is made from a sample of the rows, or from all (`whole`).
bool search(const Query& q, const at::Tensor& queries, bool exact, bool whole, float* values, int32_t* indices) {
  const int64_t m = q.database.count(), all = std::numeric_limits<int32_t>::max();
  const Frame frame = frame_of(q.database, q.metric, &q.queries, whole);
  std::vector<int64_t> unanswered;
  if (!exact || &coarse_kernels() == &q.kernels || m < kCoarseRows * q.k)
    return Screen{q, frame, q.kernels, exact, nullptr, all, all, false}.run(values, indices, unanswered);
  const int64_t listed = std::max(m / 8, 4 * q.k), evaluated = std::max(m / 32, 2 * q.k);
  if (!Screen{q, frame, coarse_kernels(), true, nullptr, listed, evaluated, true}.run(values, indices, unanswered)) return false;
  if (unanswered.empty()) return true;
  const std::vector<int64_t> positions = std::move(unanswered);
  const at::Tensor rest = queries.index_select(0, at::tensor(positions, at::kLong));
  const Rows rows(rest, q.queries.width());
  const Query again{rows, q.database, q.k, q.metric, q.squared, q.exclude_self, q.kernels};
  return Screen{again, frame, q.kernels, true, positions.data(), all, all, false}.run(values, indices, unanswered);
}

std::tuple<at::Tensor, at::Tensor> knn(const at::Tensor& queries, const at::Tensor& database, int64_t k,
                                       std::string_view metric, bool exclude_self, bool exact) {
  const at::Tensor a = queries.contiguous(), b = database.contiguous();
  const int64_t n = a.size(0), m = b.size(0), d = a.size(1);
  at::Tensor values = at::empty({n, k}, at::kFloat), indices = at::empty({n, k}, at::kInt);
  float* value = values.data_ptr<float>();
  int32_t* index = indices.data_ptr<int32_t>();
  const Metric kind = metric == "cosine" ? Metric::kCosine : metric == "dot" ? Metric::kDot : Metric::kL2;
  Rows left(a, d), right(b, d);
  if (m == 0 || d == 0 || n == 0) {
    for (int64_t i = 0; i < n; ++i) write_row({}, k, kind, value + i * k, index + i * k);
    return {values, indices};
  }
  if (kind == Metric::kCosine && n > 2) right.measure(), left.measure();  // for fewer, while the rows are read
  const Query q{left, right, k, kind, metric == "l2sq", exclude_self, screen_kernels()};
  if (n < kFewQueries || static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(d) <= kPlainWork)
    scan_database(q, value, index);
  else if (!search(q, a, exact, false, value, index))
    search(q, a, exact, true, value, index);
  return {values, indices};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("knn", &knn); }

}  // namespace
}  // namespace planmill
