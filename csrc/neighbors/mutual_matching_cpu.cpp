// mutual_matching on the CPU: both maps packed once, every pair screened in bytes where the processor has them, and what
// may be the best of its row or of its column evaluated again in float32. Maps whose rows look too much alike in bytes
// are screened again in 16 bits.
#include "common/torch_headers.h"

#include <atomic>
#include <memory>

#include "neighbors/matching.h"
#include "neighbors/scoring.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kColumns = 1024;    // right rows of a block of products
constexpr int64_t kFewRows = 12;      // below, packing costs more than it saves
constexpr int64_t kCoarseRows = 128;  // of either map, from which on bytes tell rows apart
constexpr int64_t kOpenPairs = 96;    // per row, listed at a time

enum class Outcome { kDone, kMisfit, kAlike };

struct Matcher {
  const Rows& a;
  const Rows& b;
  const Parts& parts_of_b;
  int ranks;  // 2 where the second nearest are wanted
  Known left, right;

  Matcher(const Rows& a, const Rows& b, const Parts& parts_of_b, int ranks)
      : a(a), b(b), parts_of_b(parts_of_b), ranks(ranks), left(a.count()), right(b.count()) {}
  void run();

 private:
  void compare_all();
  Outcome attempt(const ScreenKernels& kernels, const Frame& frame, bool coarse);
  bool screen(OpenPairs& open, int64_t part, int64_t parts, int64_t chunk, bool coarse) const;
};

void Matcher::run() {
  const auto pairs = static_cast<double>(a.count()) * static_cast<double>(b.count());
  if (std::min(a.count(), b.count()) < kFewRows || pairs * static_cast<double>(a.width()) <= kPlainWork) return compare_all();
  bool coarse = std::min(a.count(), b.count()) >= kCoarseRows && &coarse_kernels() != &screen_kernels();
  for (const bool whole : {false, true}) {
    const Frame frame = frame_of(b, Metric::kL2, &a, whole);
    Outcome outcome = coarse ? attempt(coarse_kernels(), frame, true) : Outcome::kAlike;
    if (outcome == Outcome::kAlike) {
      coarse = false;
      outcome = attempt(screen_kernels(), frame, false);
    }
    if (outcome == Outcome::kDone) return;
  }
}

// Every pair evaluated: the right rows are dealt to the threads.
void Matcher::compare_all() {
  const int64_t n = a.count(), m = b.count(), d = a.width();
  const auto work = static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(d);
  const int64_t parts = work > kPlainWork ? std::min<int64_t>(at::get_num_threads(), m) : 1;
  const int64_t size = m == 0 ? 0 : (m + parts - 1) / parts;
  std::vector<Known> rows(static_cast<size_t>(parts), Known(n));
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const ScreenKernels& kernels = screen_kernels();
    std::vector<float> x(static_cast<size_t>(d)), y(static_cast<size_t>(d));
    for (int64_t part = begin; part < end; ++part)
      for (int64_t j = part * size; j < std::min((part + 1) * size, m); ++j) {
        const float* row = b.get(j, y.data());
        for (int64_t i = 0; i < n; ++i) {
          const float* other = a.get(i, x.data());
          float distance;
          kernels.squared_distances(row, &other, 1, d, &distance);
          distance = distance_from_square(distance, row, other, d);
          rows[part].nearest[i].add(distance, static_cast<int32_t>(j));
          right.nearest[j].add(distance, static_cast<int32_t>(i));
        }
      }
  });
  for (const Known& part : rows) left.join(part);
}

// Each thread takes chunks of the left rows against all right rows, with bounds of its own. Chunks are dealt in turn: in
// a picture, the rows of one half may meet their neighbours early, and those of the other half list pairs until they do.
Outcome Matcher::attempt(const ScreenKernels& kernels, const Frame& frame, bool coarse) {
  const int64_t n = a.count(), m = b.count(), d = a.width();
  Packed packed_a(kernels, Packed::Side::kLeft, n, d), packed_b(kernels, Packed::Side::kRight, m, d);
  if (!packed_a.pack(a, 0, n, frame, Metric::kL2, true, false, 0)) return Outcome::kMisfit;
  if (!packed_b.pack(b, 0, m, frame, Metric::kL2, true, false, 0)) return Outcome::kMisfit;
  const Block block{kernels, packed_a, packed_b, a, b, Metric::kL2};
  const int64_t threads = at::get_num_threads();
  const int64_t chunk = even_block(n, kernels.left_rows, kernels.left_panel, threads);
  const int64_t parts = std::min(threads, (n + chunk - 1) / chunk);
  std::vector<std::unique_ptr<OpenPairs>> open(static_cast<size_t>(parts));
  std::atomic<bool> alike{false};
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      open[part] = std::make_unique<OpenPairs>(block, parts_of_b, frame.scale, ranks);
      if (alike || !screen(*open[part], part, parts, chunk, coarse)) alike = true;
    }
  });
  if (alike) return Outcome::kAlike;
  OpenPairs& all = *open[0];
  for (int64_t part = 1; part < parts; ++part) all.take(*open[part]);
  all.prune();
  all.sharpen();
  all.settle();
  left = std::move(all.left);
  right = std::move(all.right);
  return Outcome::kDone;
}

// Every `parts`-th chunk; false if the rows look too much alike.
bool Matcher::screen(OpenPairs& open, int64_t part, int64_t parts, int64_t chunk, bool coarse) const {
  const int64_t n = a.count(), m = b.count(), most = kOpenPairs * (n / parts + m);
  Workspace w;
  for (int64_t row = part * chunk; row < n; row += parts * chunk) {
    for (int64_t column = 0; column < m; column += kColumns)
      open.screen(row, std::min(chunk, n - row), column, std::min(kColumns, m - column), w);
    if (open.size() <= most) continue;
    open.prune();
    if (open.size() <= most / 2) continue;
    open.sharpen();
    if (open.size() <= most / 2) continue;
    if (coarse) return false;
    open.settle();
  }
  return true;
}

struct Results {
  float* scores;
  int32_t *nearest, *back, *indices;
};

void write(const Matcher& found, double size, double ratio, const Results& out) {
  const auto limit = static_cast<float>(ratio);
  const auto clear = [&](const TwoNearest& row) { return limit >= 1.0f || row.distance[0] <= limit * row.distance[1]; };
  for (int64_t j = 0; j < found.right.count(); ++j) out.back[j] = found.right.nearest[j].index;
  for (int64_t i = 0; i < found.left.count(); ++i) {
    const TwoNearest& row = found.left.nearest[i];
    const double distance = row.distance[0];
    out.scores[i] = row.index < 0 ? -kInfinity : static_cast<float>(size - 0.5 * distance * distance);
    out.nearest[i] = row.index;
    const bool mutual = row.index >= 0 && out.back[row.index] == i && clear(row) && clear(found.right.nearest[row.index]);
    out.indices[i] = mutual ? row.index : -1;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mutual_matching(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& a2, const at::Tensor& b2, double weight, double weight2,
    double ratio) {
  const at::Tensor x = a.contiguous(), y = b.contiguous(), x2 = a2.contiguous(), y2 = b2.contiguous();
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2), d2 = x2.size(2);
  at::Tensor scores = at::empty({batch, n}, at::kFloat), nearest = at::empty({batch, n}, at::kInt);
  at::Tensor back = at::empty({batch, m}, at::kInt), indices = at::empty({batch, n}, at::kInt);
  const auto rows_of = [](const at::Tensor& map, int64_t entry, int64_t count, int64_t width) {
    Rows rows(map.select(0, entry), width, nullptr, count);
    rows.measure();
    return rows;
  };
  const double size = weight * weight + (d2 > 0 ? weight2 * weight2 : 0.0);
  for (int64_t i = 0; i < batch; ++i) {
    const Rows a_first = rows_of(x, i, n, d), a_second = rows_of(x2, i, n, d2);
    const Rows b_first = rows_of(y, i, m, d), b_second = rows_of(y2, i, m, d2);
    const Rows rows_a(&a_first, weight, &a_second, weight2), rows_b(&b_first, weight, &b_second, weight2);
    const Parts parts{{&b_first, &b_second}, {weight, weight2}};
    Matcher matcher(rows_a, rows_b, parts, ratio < 1.0 ? 2 : 1);
    matcher.run();
    write(matcher, size, ratio,
          {scores.data_ptr<float>() + i * n, nearest.data_ptr<int32_t>() + i * n, back.data_ptr<int32_t>() + i * m,
           indices.data_ptr<int32_t>() + i * n});
  }
  return {scores, nearest, back, indices};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("mutual_matching", &mutual_matching); }

}  // namespace
}  // namespace planmill
