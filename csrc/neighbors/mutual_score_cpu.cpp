// mutual_score on the CPU: each unordered pair of images once, row and column minima from the same tile.
#include "common/torch_headers.h"

#include <atomic>
#include <limits>

#include "neighbors/scoring.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = -3.0e38f;
constexpr int64_t kColumns = 1024;  // right rows of a block

// How a pair's distances are reached: from candidates evaluated again (exact), or from the screened values themselves.
struct Scorer {
  const ScreenKernels& kernels;
  const Rows& rows;
  int64_t images, patches;
  bool exact;
  float* table;  // [N, P, N], distances; infinity where nothing was found

  float& entry(int64_t i, int64_t p, int64_t j) const { return table[(i * patches + p) * images + j]; }

  void distances_of_pairs();
  bool pack_right(Packed& right, const Frame& frame) const;
  void image(int64_t i, const Packed& left, const Packed& right, int64_t padded, float scale);
  void settle(const Block& block, int64_t j, const float* low_right, float* column_best, Workspace& w) const;
  void exact_task(int64_t i, int64_t j, int64_t first, int64_t last, const Block& block, int64_t padded,
                  float* column_best, Workspace& w) const;
  void screened_task(int64_t i, int64_t j, int64_t first, int64_t last, const Block& block, int64_t padded,
                     float* column_best, float scale, Workspace& w) const;
};

bool Scorer::pack_right(Packed& right, const Frame& frame) const {
  std::atomic<bool> fits{true};
  const int64_t padded = right.padded(patches);
  at::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j)
      if (!right.pack(rows, j * patches, patches, frame, Metric::kL2, true, !exact, j * padded)) fits = false;
  });
  return fits;
}

void Scorer::distances_of_pairs() {
  const int64_t d = rows.width();
  const int64_t padded = round_up(patches, kernels.right_panel);
  Packed right(kernels, Packed::Side::kRight, images * padded, d);
  Frame frame = frame_of(rows, Metric::kL2, nullptr, false);
  if (!pack_right(right, frame)) {
    frame = frame_of(rows, Metric::kL2, nullptr, true);
    pack_right(right, frame);
  }
  Packed left(kernels, Packed::Side::kLeft, patches, d);
  for (int64_t i = 0; i + 1 < images; ++i) {
    left.pack(rows, i * patches, patches, frame, Metric::kL2, true, !exact, 0);
    image(i, left, right, padded, frame.scale);
  }
}

// Image i against all later ones. Tasks are (image, slice of the patches of i): as few slices as keep the threads even.
void Scorer::image(int64_t i, const Packed& left, const Packed& right, int64_t padded, float scale) {
  const int64_t others = images - 1 - i, threads = at::get_num_threads();
  const int64_t most = (patches + kernels.left_rows - 1) / kernels.left_rows;
  int64_t slices = 1;
  while (slices < most && (others * slices) % threads != 0 && others * slices < 8 * threads) ++slices;
  const int64_t step = even_block(patches, (patches + slices - 1) / slices, kernels.left_panel, 1);
  std::vector<float> column_best(static_cast<size_t>(others * slices * patches), kInfinity);
  const Block block{kernels, left, right, rows, rows, Metric::kL2};
  at::parallel_for(0, others * slices, 1, [&](int64_t begin, int64_t end) {
    Workspace w;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j = i + 1 + task / slices, first = task % slices * step, last = std::min(first + step, patches);
      float* columns = column_best.data() + task * patches;
      if (first >= last) continue;
      if (exact) exact_task(i, j, first, last, block, padded, columns, w);
      else screened_task(i, j, first, last, block, padded, columns, scale, w);
    }
  });
  for (int64_t task = 0; task < others * slices; ++task)
    for (int64_t q = 0; q < patches; ++q) {
      float& best = entry(i + 1 + task / slices, q, i);
      best = std::min(best, column_best[static_cast<size_t>(task * patches + q)]);
    }
}

void Scorer::exact_task(int64_t i, int64_t j, int64_t first, int64_t last, const Block& block, int64_t padded,
                        float* column_best, Workspace& w) const {
  const int64_t chunk = even_block(last - first, kernels.left_rows, kernels.left_panel, 1);
  std::vector<float> low_right(static_cast<size_t>(padded), kLowest);
  for (int64_t q = 0; q < padded; ++q)
    if (!block.right.valid(j * padded + q)) low_right[q] = kInfinity;
  std::vector<float> low_left(static_cast<size_t>(chunk)), row_best(static_cast<size_t>(chunk));
  for (int64_t p = first; p < last; p += chunk) {
    const int64_t count = std::min(chunk, last - p);
    std::fill(low_left.begin(), low_left.end(), kLowest);
    std::fill(row_best.begin(), row_best.end(), kInfinity);
    for (int64_t q = 0; q < patches; q += kColumns)
      visit_candidates(block, p, i * patches + p, count, j * padded + q, j * patches + q, std::min(kColumns, patches - q),
                       low_left.data(), low_right.data() + q, w,
                       [&](int64_t r, const int32_t* found, const float* distances, int64_t n) {
                         for (int64_t k = 0; k < n; ++k) {
                           row_best[r] = std::min(row_best[r], distances[k]);
                           column_best[q + found[k]] = std::min(column_best[q + found[k]], distances[k]);
                         }
                       });
    for (int64_t r = 0; r < count; ++r) entry(i, p + r, j) = row_best[r];
    if (static_cast<int64_t>(w.pending.size()) > 8 * patches) settle(block, j, low_right.data(), column_best, w);
  }
  settle(block, j, low_right.data(), column_best, w);
}

// Evaluates the pending pairs of image j that later rows have not ruled out.
void Scorer::settle(const Block& block, int64_t j, const float* low_right, float* column_best, Workspace& w) const {
  size_t kept = 0;
  for (const Pending& pair : w.pending)
    if (pair.bound >= low_right[pair.right - j * patches]) w.pending[kept++] = pair;
  w.pending.resize(kept);
  const int32_t only = 0;
  for (const Pending& pair : w.pending) {
    float distance;
    block.evaluate(pair.left, pair.right, &only, 1, w, &distance);
    float& best = column_best[pair.right - j * patches];
    best = std::min(best, distance);
  }
  w.pending.clear();
}

void Scorer::screened_task(int64_t i, int64_t j, int64_t first, int64_t last, const Block& block, int64_t padded,
                           float* column_best, float scale, Workspace& w) const {
  const int64_t chunk = even_block(last - first, kernels.left_rows, kernels.left_panel, 1);
  const auto distance = [&](float half, float v) { return std::sqrt(std::max(0.0f, 2.0f * (half - v))) / scale; };
  std::vector<float> best_right(static_cast<size_t>(padded), kLowest), best_left(static_cast<size_t>(chunk));
  const StatsView right = block.right.stats(j * padded);
  for (int64_t p = first; p < last; p += chunk) {
    const int64_t count = std::min(chunk, last - p);
    const StatsView left = block.left.stats(p);
    std::fill(best_left.begin(), best_left.end(), kLowest);
    for (int64_t q = 0; q < patches; q += kColumns) {
      const int64_t columns = block.right.padded(std::min(kColumns, patches - q));
      w.products.resize(static_cast<size_t>(block.left.padded(count) * columns));
      kernels.multiply(block.left.at(p), block.right.at(j * padded + q), block.left.panels(count),
                       block.right.panels(columns), block.left.pairs(), w.products.data(), columns);
      kernels.maxima(w.products.data(), count, columns, columns, left, block.right.stats(j * padded + q), best_left.data(),
                     best_right.data() + q);
    }
    for (int64_t r = 0; r < count; ++r)
      entry(i, p + r, j) = left.half[r] < kInfinity && best_left[r] > kLowest ? distance(left.half[r], best_left[r]) : kInfinity;
  }
  for (int64_t q = 0; q < patches; ++q)
    if (right.half[q] < kInfinity && best_right[q] > kLowest) column_best[q] = distance(right.half[q], best_right[q]);
}

at::Tensor mutual_score(const at::Tensor& features, double low, double high, double radius, int64_t width, bool exact) {
  at::Tensor x = features.contiguous();
  const int64_t n = x.size(0), p = x.size(1), d = x.size(2);
  const ScreenKernels& kernels = screen_kernels();
  const double work = static_cast<double>(n) * n * p * p * d;
  if (exact && work > kPlainWork) x = x.to(at::kFloat);
  const Rows rows(x, d);
  at::Tensor table = at::empty({n, p, n}, at::kFloat);
  float* entries = table.data_ptr<float>();
  std::fill_n(entries, table.numel(), kInfinity);
  if (radius >= 0 || work <= kPlainWork) {
    at::parallel_for(0, n * n, work <= kPlainWork ? n * n : 1, [&](int64_t first, int64_t last) {
      Workspace w;
      for (int64_t pair = first; pair < last; ++pair)
        if (pair / n != pair % n)
          plain_distances(kernels, rows, pair / n, p, rows, pair % n, p, radius, width,
                          entries + pair / n * p * n + pair % n, n, w);
    });
    return interval_means(table, low, high, true);
  }
  Scorer{kernels, rows, n, p, exact, entries}.distances_of_pairs();
  return interval_means(table, low, high, true);
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("mutual_score", &mutual_score); }

}  // namespace
}  // namespace planmill
