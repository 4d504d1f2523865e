#include "common/torch_headers.h"

#include <atomic>
#include <limits>

#include "neighbors/search.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = -3.0e38f;
constexpr int64_t kColumns = 1024;               // right rows of a block
constexpr int64_t kPackedBytes = int64_t{24} << 20;  // of the database, packed at a time
constexpr int64_t kQueryBytes = int64_t{1} << 20;    // and of the queries, by a thread, where there are segments

}  // namespace

void Search::run() {
  if (!attempt(frame_of(database, metric, &queries, false))) attempt(frame_of(database, metric, &queries, true));
}

bool Search::pack_queries(Packed& left, int64_t first, int64_t count, const Frame& frame) const {
  const bool fits = left.pack(queries, first, count, frame, metric, metric == Metric::kL2, !exact, 0);
  if (query_inverse != nullptr)
    for (int64_t i = 0; i < count; ++i)
      if (query_inverse[first + i] == 0.0) left.stats(i).half[0] = kInfinity;
  return fits;
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

// Groups of segments, packed once; chunks of queries are packed where they meet one, and stay in cache.
bool Search::attempt(const Frame& frame) {
  const int64_t d = queries.width(), row_bytes = 2 * d + 64;
  for (int64_t first = 0; first < segments();) {
    int64_t last = first, slots_used = 0;
    do slots_used += round_up(offsets[last + 1] - offsets[last], kernels.right_panel), ++last;
    while (last < segments() && (slots_used + round_up(offsets[last + 1] - offsets[last], kernels.right_panel)) * row_bytes <= kPackedBytes);
    Packed right(kernels, Packed::Side::kRight, slots_used, d);
    std::vector<int64_t> slots;
    if (!pack_segments(right, first, last, frame, slots) || !meet(right, slots, first, last, frame)) return false;
    first = last;
  }
  return true;
}

// Tasks are (run of segments, chunk of queries): few runs, since each packs the queries again, but tasks for every thread.
// Chunks of a thread are packed together where there are several segments, so that each segment stays in cache for them.
bool Search::meet(const Packed& right, const std::vector<int64_t>& slots, int64_t first, int64_t last,
                  const Frame& frame) const {
  const int64_t n = queries.count(), d = queries.width(), threads = at::get_num_threads();
  const int64_t chunk = even_block(n, kernels.left_rows, kernels.left_panel, threads), chunks = (n + chunk - 1) / chunk;
  const int64_t runs = chunks >= 2 * threads ? 1 : std::min(last - first, (4 * threads + chunks - 1) / chunks);
  const int64_t step = (last - first + runs - 1) / runs;
  const int64_t together = last - first == 1 ? 1 : std::clamp<int64_t>(kQueryBytes / (chunk * (2 * d + 64)), 1, chunks);
  std::atomic<bool> fits{true};
  at::parallel_for(0, chunks * runs, 1, [&](int64_t begin, int64_t end) {
    Workspace w;
    Packed left(kernels, Packed::Side::kLeft, chunk * together, d);
    const Block block{kernels, left, right, queries, database, metric, query_inverse, database_inverse};
    for (int64_t t = begin; t < end && fits;) {
      const int64_t run = t / chunks, query = t % chunks * chunk, stop = std::min({t + together, end, (run + 1) * chunks});
      const int64_t count = std::min((stop - t) * chunk, n - query);
      if (!pack_queries(left, query, count, frame)) fits = false;
      for (int64_t s = first + run * step; s < std::min(first + (run + 1) * step, last) && fits; ++s)
        for (int64_t at = 0; at < count; at += chunk)
          task(block, at, query + at, std::min(chunk, count - at), s, slots[s - first], frame.scale, w);
      t = stop;
    }
  });
  return fits;
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

}  // namespace planmill
