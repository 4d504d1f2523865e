// knn on the CPU: the database is packed and screened block by block, each query keeps the rows that could be among its k
// nearest, and these are evaluated again in float32.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "neighbors/scoring.h"
#include "neighbors/shortlist.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kColumns = 1024;                   // right rows of a block of products
constexpr int64_t kPackedRows = 4096;                // right rows packed at a time
constexpr int64_t kQueryBytes = int64_t{8} << 20;    // of queries packed at a time
constexpr int64_t kFewQueries = 12;                  // below, packing the database costs more than reading it

struct Neighbor {
  float distance;  // smaller is nearer
  int32_t index;
  bool operator<(const Neighbor& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

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

// |x|^2 within float32's range needs no second look; the rest is done again in double.
float squared_distance(float square, const float* x, const float* y, int64_t d) {
  if (square > 1.0e-30f && square < 1.0e37f) return square;
  const double distance = distance_from_square(square, x, y, d);
  return static_cast<float>(distance * distance);
}

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
      float& value = values[j];
      if (metric == Metric::kL2) {
        value = squared ? squared_distance(value, x, rows[j], d) : distance_from_square(value, x, rows[j], d);
      } else if (metric == Metric::kDot) {
        value = -static_cast<float>(product_in_range(value, x, rows[j], d));
      } else {
        const double both = own * length_of_row(rows[j], d);
        value = static_cast<float>(1.0 - (both == 0.0 ? 0.0 : product_in_range(value, x, rows[j], d) / both));
      }
      out[first + j] = {value, index[first + j]};
    }
  }
}

void write_row(const std::vector<Neighbor>& sorted, int64_t k, Metric metric, float* values, int32_t* indices) {
  for (int64_t j = 0; j < k; ++j) {
    const bool found = j < static_cast<int64_t>(sorted.size());
    const float distance = found ? sorted[j].distance : kInfinity;
    values[j] = metric == Metric::kDot ? -distance : distance;
    indices[j] = found ? sorted[j].index : -1;
  }
}

// Few queries: every row of the database is read once and compared with all of them.
void scan_database(const Query& q, float* values, int32_t* indices) {
  const int64_t n = q.queries.count(), m = q.database.count(), d = q.queries.width();
  const double work = static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(d);
  const int64_t parts = work > kPlainWork ? at::get_num_threads() : 1, size = (m + parts - 1) / std::max<int64_t>(parts, 1);
  std::vector<Best<Neighbor>> nearest(static_cast<size_t>(n * parts), Best<Neighbor>(q.k));
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
    Best<Neighbor>& all = nearest[i * parts];
    for (int64_t part = 1; part < parts; ++part)
      for (const Neighbor& neighbor : nearest[i * parts + part].sorted()) all.add(neighbor);
    write_row(all.sorted(), q.k, q.metric, values + i * q.k, indices + i * q.k);
  }
}

struct Screen {
  const Query& q;
  const Frame& frame;
  bool exact;

  bool run(float* values, int32_t* indices) const;
  void screen(const Packed& left, const Packed& right, int64_t slot, int64_t query, int64_t count, int64_t row,
              int64_t rows, Shortlist* lists, Workspace& w) const;
};

bool Screen::run(float* values, int32_t* indices) const {
  const int64_t n = q.queries.count(), m = q.database.count(), d = q.queries.width();
  const int64_t group = std::min(n, std::max(q.kernels.left_rows, kQueryBytes / (2 * d + 64)));
  const int64_t chunk = even_block(group, q.kernels.left_rows, q.kernels.left_panel, at::get_num_threads());
  Packed left(q.kernels, Packed::Side::kLeft, group, d);
  Packed right(q.kernels, Packed::Side::kRight, std::min(kPackedRows, m), d);
  for (int64_t first = 0; first < n; first += group) {
    const int64_t count = std::min(group, n - first), chunks = (count + chunk - 1) / chunk;
    if (!left.pack(q.queries, first, count, frame, q.metric, q.metric == Metric::kL2, false, 0)) return false;
    std::vector<Shortlist> lists(static_cast<size_t>(count), Shortlist(q.k, kLowest));
    for (int64_t row = 0; row < m; row += kPackedRows) {
      const int64_t rows = std::min(kPackedRows, m - row);
      if (!right.pack(q.database, row, rows, frame, q.metric, true, false, 0)) return false;
      at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Workspace w;
        for (int64_t c = begin; c < end; ++c)
          screen(left, right, c * chunk, first + c * chunk, std::min(chunk, count - c * chunk), row, rows,
                 lists.data() + c * chunk, w);
      });
    }
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Workspace w;
      std::vector<float> scratch(static_cast<size_t>(d));
      std::vector<Neighbor> found;
      for (int64_t i = begin; i < end; ++i) {
        const std::vector<int32_t>& rows = lists[i].rows();
        found.resize(rows.size());
        q.evaluate(q.queries.get(first + i, scratch.data()), rows.data(), static_cast<int64_t>(rows.size()), found.data(), w);
        const auto kept = std::min<int64_t>(q.k, static_cast<int64_t>(found.size()));
        std::partial_sort(found.begin(), found.begin() + kept, found.end());
        found.resize(static_cast<size_t>(kept));
        write_row(found, q.k, q.metric, values + (first + i) * q.k, indices + (first + i) * q.k);
      }
    });
  }
  return true;
}

void Screen::screen(const Packed& left, const Packed& right, int64_t slot, int64_t query, int64_t count, int64_t row,
                    int64_t rows, Shortlist* lists, Workspace& w) const {
  const StatsView own = left.stats(slot);
  for (int64_t c = 0; c < rows; c += kColumns) {
    const int64_t ld = right.padded(std::min(kColumns, rows - c));
    w.products.resize(static_cast<size_t>(left.padded(count) * ld));
    w.found.resize(static_cast<size_t>(ld));
    w.low_left.resize(static_cast<size_t>(ld));
    w.low_right.resize(static_cast<size_t>(ld));
    q.kernels.multiply(left.at(slot), right.at(c), left.panels(count), right.panels(ld), left.pairs(), w.products.data(), ld);
    for (int64_t r = 0; r < count; ++r) {
      if (!left.valid(slot + r)) continue;
      const RowStats stats{own.inv[r], own.half[r], own.norm[r], own.res[r]};
      if (lists[r].threshold() <= kLowest) {
        const int64_t groups = q.kernels.group_bounds(w.products.data() + r * ld, ld, stats, right.stats(c), exact,
                                                      w.low_left.data());
        lists[r].start(w.low_left.data(), groups, q.exclude_self ? 1 : 0);
      }
      const int64_t listed = q.kernels.list_above(w.products.data() + r * ld, ld, stats, right.stats(c), exact,
                                                  lists[r].threshold(), w.found.data(), w.low_left.data(), w.low_right.data());
      for (int64_t j = 0; j < listed; ++j) {
        const int64_t index = row + c + w.found[j];
        if (!(q.exclude_self && index == query + r))
          lists[r].add(w.low_left[j], w.low_right[j], static_cast<int32_t>(index));
      }
    }
  }
}

std::tuple<at::Tensor, at::Tensor> knn(const at::Tensor& queries, const at::Tensor& database, int64_t k,
                                       std::string_view metric, bool exclude_self, bool exact) {
  const at::Tensor a = queries.contiguous(), b = database.contiguous();
  const int64_t n = a.size(0), m = b.size(0), d = a.size(1);
  at::Tensor values = at::empty({n, k}, at::kFloat), indices = at::empty({n, k}, at::kInt);
  float* value = values.data_ptr<float>();
  int32_t* index = indices.data_ptr<int32_t>();
  const Metric kind = metric == "cosine" ? Metric::kCosine : metric == "dot" ? Metric::kDot : Metric::kL2;
  const Rows left(a, d), right(b, d);
  if (m == 0 || d == 0 || n == 0) {
    for (int64_t i = 0; i < n; ++i) write_row({}, k, kind, value + i * k, index + i * k);
    return {values, indices};
  }
  const Query q{left, right, k, kind, metric == "l2sq", exclude_self, screen_kernels()};
  if (n < kFewQueries || static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(d) <= kPlainWork) {
    scan_database(q, value, index);
  } else if (!Screen{q, frame_of(right, kind, &left, false), exact}.run(value, index)) {
    Screen{q, frame_of(right, kind, &left, true), exact}.run(value, index);
  }
  return {values, indices};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("knn", &knn); }

}  // namespace
}  // namespace planmill
