#include "common/torch_headers.h"

#include "neighbors/matching.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = -3.0e38f;

// The `ranks` pairs of largest value that a row has seen.
struct Seen {
  float value[2] = {-kInfinity, -kInfinity};
  int64_t pair[2] = {-1, -1};
  void add(float v, int64_t k, int ranks) {
    if (v > value[0]) {
      value[1] = value[0], pair[1] = pair[0];
      value[0] = v, pair[0] = k;
    } else if (ranks == 2 && v > value[1]) {
      value[1] = v, pair[1] = k;
    }
  }
};

}  // namespace

Known::Known(int64_t rows)
    : nearest(static_cast<size_t>(rows)), low(static_cast<size_t>(2 * rows), kLowest), looked(low) {}

void Known::look(int64_t i, float bound) {
  float &best = looked[i], &second = looked[count() + i];
  second = std::max(second, std::min(best, bound));
  best = std::max(best, bound);
  bounds(0)[i] = std::max(bounds(0)[i], best);
  bounds(1)[i] = std::max(bounds(1)[i], second);
}

void Known::join(const Known& other) {
  const int64_t n = count();
  for (int64_t i = 0; i < n; ++i) nearest[i].join(other.nearest[i]);
  for (auto of : {&Known::low, &Known::looked}) {
    std::vector<float>& mine = this->*of;
    const std::vector<float>& theirs = other.*of;
    for (int64_t i = 0; i < n; ++i) {
      const float a = mine[i], b = theirs[i];
      mine[i] = std::max(a, b);
      mine[n + i] = std::max(std::min(a, b), std::max(mine[n + i], theirs[n + i]));
    }
  }
}

OpenPairs::OpenPairs(const Block& block, const Parts& right_parts, float scale, int ranks)
    : left(block.left_rows.count()), right(block.right_rows.count()), block_(block), parts_(right_parts), scale_(scale),
      rounding_((0.25f * static_cast<float>(block.left_rows.width()) + 16.0f) * 6.0e-8f),  // of a sum in four parts or more
      ranks_(ranks) {
  const StatsView stats = block.left.stats(0);
  double error = 0.0;  // of the screen, nearly
  int64_t valid = 0;
  for (int64_t i = 0; i < left.count(); ++i)
    if (stats.half[i] < kInfinity) error += static_cast<double>(stats.res[i]) * stats.norm[i], ++valid;
  looks_ = look_error() < 0.25 * error / static_cast<double>(std::max<int64_t>(valid, 1));
}

// Of the inner product of rows as they are put together, in the coordinates of the screen.
float OpenPairs::look_error() const {
  double squares = 0.0;
  for (int p = 0; p < 2; ++p)
    if (parts_.rows[p]->width() > 0) squares += parts_.lengths[p] * parts_.lengths[p];
  return static_cast<float>(squares) * scale_ * scale_ * (rounding_ + 1.0e-6f);
}

void OpenPairs::screen(int64_t row, int64_t rows, int64_t column, int64_t columns, Workspace& w) {
  const int64_t ld = block_.right.padded(columns);
  w.products.resize(static_cast<size_t>(block_.left.padded(rows) * ld));
  w.found.resize(static_cast<size_t>(ld));
  w.bounds.resize(static_cast<size_t>(ld));
  block_.kernels.multiply(block_.left.at(row), block_.right.at(column), block_.left.panels(rows), block_.right.panels(ld),
                          block_.left.pairs(), w.products.data(), ld);
  const StatsView own = block_.left.stats(row), others = block_.right.stats(column);
  // Bounds of whole panels of columns: those behind the last row of the right map are written here, not to its neighbour.
  w.low_right.assign(static_cast<size_t>(2 * ld), kLowest);
  for (int rank = 0; rank < 2; ++rank)
    std::copy_n(right.bounds(rank) + column, columns, w.low_right.begin() + rank * ld);
  float* low = left.bounds(0) + row;
  if (ranks_ == 2)
    block_.kernels.two_lower_bounds(w.products.data(), rows, ld, ld, own, others, low, left.count(), w.low_right.data(), ld);
  else
    block_.kernels.lower_bounds(w.products.data(), rows, ld, ld, own, others, low, w.low_right.data());
  for (int rank = 0; rank < 2; ++rank)
    std::copy_n(w.low_right.begin() + rank * ld, columns, right.bounds(rank) + column);
  float* threshold = w.low_right.data() + (ranks_ - 1) * ld;
  for (int64_t c = 0; c < ld; ++c)
    if (!(others.half[c] < kInfinity)) threshold[c] = kInfinity;
  for (int64_t r = 0; r < rows; ++r) {
    if (!block_.left.valid(row + r)) continue;
    const RowStats stats{own.inv[r], own.half[r], own.norm[r], own.res[r]};
    const int64_t count = block_.kernels.list_pairs(w.products.data() + r * ld, ld, stats, others,
                                                    left.bounds(ranks_ - 1)[row + r], threshold, w.found.data(),
                                                    w.bounds.data());
    for (int64_t k = 0; k < count; ++k)
      screened_.push_back({static_cast<int32_t>(row + r), static_cast<int32_t>(column + w.found[k]), w.bounds[k]});
  }
}

void OpenPairs::prune() {
  const float* half_left = block_.left.stats(0).half;
  const float* half_right = block_.right.stats(0).half;
  const float* low_left = left.bounds(ranks_ - 1);
  const float* low_right = right.bounds(ranks_ - 1);
  const auto closed = [&](const OpenPair& p) {
    return !(p.upper - half_right[p.right] >= low_left[p.left] || p.upper - half_left[p.left] >= low_right[p.right]);
  };
  std::erase_if(screened_, closed);
  std::erase_if(looked_, closed);
}

void OpenPairs::sharpen() {
  const float* half_left = block_.left.stats(0).half;
  const float* half_right = block_.right.stats(0).half;
  std::vector<Seen> rows(static_cast<size_t>(left.count())), columns(static_cast<size_t>(right.count()));
  for (size_t k = 0; k < screened_.size(); ++k) {
    const OpenPair& p = screened_[k];
    rows[p.left].add(p.upper - half_right[p.right], static_cast<int64_t>(k), ranks_);
    columns[p.right].add(p.upper - half_left[p.left], static_cast<int64_t>(k), ranks_);
  }
  std::vector<char> chosen(screened_.size());
  for (const auto* side : {&rows, &columns})
    for (const Seen& seen : *side)
      for (const int64_t k : seen.pair)
        if (k >= 0) chosen[k] = 1;
  std::vector<OpenPair> some;
  size_t kept = 0;
  for (size_t k = 0; k < screened_.size(); ++k) {
    if (chosen[k] != 0) some.push_back(screened_[k]);
    else screened_[kept++] = screened_[k];
  }
  screened_.resize(kept);
  if (looks_) look(some);
  else close(some);
  prune();
}

void OpenPairs::settle() {
  if (looks_) {
    look(screened_);
    screened_.clear();
    prune();
  }
  close(screened_);
  close(looked_);
  screened_.clear();
  looked_.clear();
}

void OpenPairs::take(OpenPairs& other) {
  left.join(other.left);
  right.join(other.right);
  screened_.insert(screened_.end(), other.screened_.begin(), other.screened_.end());
  looked_.insert(looked_.end(), other.looked_.begin(), other.looked_.end());
  other.screened_ = {};
  other.looked_ = {};
}

// Pairs of one left row follow one another: calls `work(begin, end, workspace)` with runs of them.
template <class Work>
void for_runs(const std::vector<OpenPair>& pairs, int64_t width, Work work) {
  at::parallel_for(0, static_cast<int64_t>(pairs.size()), std::max<int64_t>(1, 65536 / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
    Workspace w;
    for (int64_t k = begin; k < end;) {
      const int64_t start = k;
      while (k < end && pairs[k].left == pairs[start].left) ++k;
      work(start, k, w);
    }
  });
}

void OpenPairs::close(const std::vector<OpenPair>& pairs) {
  std::vector<float> distances(pairs.size());
  for_runs(pairs, block_.left_rows.width(), [&](int64_t begin, int64_t end, Workspace& w) {
    w.found.clear();
    for (int64_t k = begin; k < end; ++k) w.found.push_back(pairs[k].right);
    w.values.resize(static_cast<size_t>(round_up(end - begin, 4)));
    block_.evaluate(pairs[begin].left, 0, w.found.data(), end - begin, w, w.values.data());
    std::copy_n(w.values.begin(), end - begin, distances.begin() + begin);
  });
  for (size_t k = 0; k < pairs.size(); ++k) {
    left.nearest[pairs[k].left].add(distances[k], pairs[k].right);
    right.nearest[pairs[k].right].add(distances[k], pairs[k].left);
  }
  raise(left, block_.left.stats(0));
  raise(right, block_.right.stats(0));
}

// Inner products of rows put together, in float32: the left row as it is, right rows where they are stored.
void OpenPairs::products(const std::vector<OpenPair>& pairs, int64_t begin, int64_t end, float* out, Workspace& w) const {
  w.scratch.resize(static_cast<size_t>(block_.left_rows.width()));
  const float* x = block_.left_rows.get(pairs[begin].left, w.scratch.data());
  std::fill(out, out + (end - begin), 0.0f);
  for (int p = 0; p < 2; ++p) {
    const Rows& rows = *parts_.rows[p];
    const int64_t d = rows.width();
    if (d == 0) continue;
    w.scratch_rows.resize(static_cast<size_t>(std::max<int64_t>(4 * d, static_cast<int64_t>(w.scratch_rows.size()))));
    for (int64_t k = begin; k < end; k += 4) {
      const int64_t some = std::min<int64_t>(4, end - k);
      const float* y[4];
      float values[4];
      for (int64_t j = 0; j < some; ++j) y[j] = rows.get(pairs[k + j].right, w.scratch_rows.data() + j * d);
      block_.kernels.dots(x, y, some, d, values);
      for (int64_t j = 0; j < some; ++j) {
        const double product = product_in_range(values[j], x, y[j], d);
        out[k + j - begin] += static_cast<float>(product * (parts_.lengths[p] / rows.length(pairs[k + j].right, y[j])));
      }
    }
    x += d;
  }
}

// Bounds of float32 in place of the screen's; the pairs go to `looked_`.
void OpenPairs::look(std::vector<OpenPair>& pairs) {
  std::vector<float> values(pairs.size());
  for_runs(pairs, block_.left_rows.width(), [&](int64_t begin, int64_t end, Workspace& w) {
    products(pairs, begin, end, values.data() + begin, w);
  });
  const StatsView own = block_.left.stats(0), others = block_.right.stats(0);
  const float squares = look_error() / (rounding_ + 1.0e-6f), error = look_error();
  for (size_t k = 0; k < pairs.size(); ++k) {
    OpenPair& p = pairs[k];
    const float half = own.half[p.left] + others.half[p.right];
    const float norms = own.norm[p.left] * own.norm[p.left] + others.norm[p.right] * others.norm[p.right];
    // x.y = |x|^2 / 2 + |y|^2 / 2 - |x - y|^2 / 2, and the last term does not change with the origin
    const float product = half - (squares - scale_ * scale_ * values[k]), wrong = error + rounding_ * norms + 1.0e-30f;
    left.look(p.left, product - wrong - others.half[p.right]);
    right.look(p.right, product - wrong - own.half[p.left]);
    looked_.push_back({p.left, p.right, std::min(p.upper, product + wrong)});
  }
}

// v of a pair at that distance, from below: v = |x|^2 / 2 - |x - y|^2 / 2, less the rounding of both and of the distance.
float OpenPairs::bound(float distance, float half, float norm) const {
  const float gap = distance * scale_, reach = norm + gap;
  return half - 0.5f * gap * gap - rounding_ * (norm * norm + reach * reach) - 1.0e-30f;
}

void OpenPairs::raise(Known& side, const StatsView& stats) const {
  for (int64_t i = 0; i < side.count(); ++i) {
    if (side.nearest[i].index < 0) continue;
    for (int rank = 0; rank < ranks_; ++rank)
      if (side.nearest[i].distance[rank] < kInfinity) {
        float& low = side.bounds(rank)[i];
        low = std::max(low, bound(side.nearest[i].distance[rank], stats.half[i], stats.norm[i]));
      }
  }
}

}  // namespace planmill
