// matching_pursuit on the CPU: the dictionary is packed once and screened once per step against the residuals; the atoms
// that could be a residual's best are evaluated in float32, as are those that nearly were at the step before: they tell
// from the start of a step how large a correlation has to be.
#include "common/torch_headers.h"

#include <ATen/ops/tensor.h>

#include <limits>
#include <memory>

#include "neighbors/listing.h"

namespace planmill {
namespace {

constexpr int64_t kGroup = 4096;    // tokens that are taken through all steps together
constexpr int64_t kNear = 4;        // atoms of the step before that are looked at first
constexpr int64_t kFewAtoms = 128;  // evaluated without a screen

// A packed dictionary, and room for packed residuals.
struct Level {
  const ScreenKernels& kernels;
  Packed atoms, residuals;
  int64_t listed, evaluated;  // atoms of a token; with more, it is left to a finer level

  Level(const ScreenKernels& k, int64_t m, int64_t tokens, int64_t d, int64_t listed_, int64_t evaluated_)
      : kernels(k), atoms(k, Packed::Side::kRight, m, d), residuals(k, Packed::Side::kLeft, tokens, d), listed(listed_),
        evaluated(evaluated_) {}
};

struct Near {
  int32_t atoms[kNear];
  int64_t count = 0;
};

class Pursuit {
 public:
  Pursuit(const at::Tensor& residual, const at::Tensor& dictionary, int64_t steps, float* values, int32_t* indices)
      : residual_(residual), rows_(residual, residual.size(1)), atoms_(dictionary, dictionary.size(1)), steps_(steps),
        d_(residual.size(1)), m_(dictionary.size(0)), values_(values), indices_(indices) {}

  void run() {
    find_usable();
    const int64_t n = rows_.count();
    if (m_ >= kFewAtoms) {
      const bool bytes = &coarse_kernels() != &screen_kernels();
      if (!prepare(bytes, false)) prepare(bytes, true);
    }
    for (int64_t first = 0; first < n; first += kGroup) {
      const int64_t count = std::min(kGroup, n - first);
      near_.assign(static_cast<size_t>(count), Near());
      for (int64_t step = 0; step < steps_; ++step) take_step(first, count, step);
    }
  }

 private:
  void find_usable() {
    usable_.assign(static_cast<size_t>(m_), 0);
    at::parallel_for(0, m_, 256, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(static_cast<size_t>(d_));
      for (int64_t i = begin; i < end; ++i) usable_[i] = finite_row(atoms_.get(i, scratch.data()), d_);
    });
    first_usable_ = static_cast<int32_t>(std::find(usable_.begin(), usable_.end(), 1) - usable_.begin());
    if (first_usable_ == m_) first_usable_ = -1;
  }

  // Packs the dictionary, in bytes where the processor has products of them.
  bool prepare(bool bytes, bool whole) {
    frame_ = frame_of(atoms_, Metric::kDot, nullptr, whole);
    const auto tokens = std::min(kGroup, rows_.count());
    if (bytes) level_ = std::make_unique<Level>(coarse_kernels(), m_, tokens, d_, m_ / 8, m_ / 32);
    else level_ = std::make_unique<Level>(screen_kernels(), m_, tokens, d_, m_, m_);
    return pack(*level_);
  }
  bool pack(Level& level) const { return level.atoms.pack(atoms_, 0, m_, frame_, Metric::kDot, true, false, 0); }

  void take_step(int64_t first, int64_t count, int64_t step) {
    if (m_ < kFewAtoms) {
      std::vector<int32_t> all;
      for (int32_t i = 0; i < static_cast<int32_t>(m_); ++i)
        if (usable_[i]) all.push_back(i);
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        Workspace w;
        for (int64_t i = begin; i < end; ++i) settle(first + i, step, all, w);
      });
      return;
    }
    std::vector<int64_t> rest = search(*level_, rows_, first, count, nullptr, first, step);
    if (rest.empty()) return;
    if (!fine_) {  // fits, as the bytes did
      fine_ = std::make_unique<Level>(screen_kernels(), m_, std::min(kGroup, rows_.count()), d_, m_, m_);
      pack(*fine_);
    }
    const at::Tensor some = residual_.index_select(0, at::tensor(rest, at::kLong));
    const Rows rows(some, d_);
    search(*fine_, rows, 0, rows.count(), rest.data(), first, step);
    if (2 * static_cast<int64_t>(rest.size()) > count) level_ = std::move(fine_);  // bytes do not tell these atoms apart
  }

  // One step of tokens [first, first + count) of `rows`; `tokens` are their places among all, null where they are the
  // same. Returns the tokens that the level could not tell apart.
  std::vector<int64_t> search(Level& level, const Rows& rows, int64_t first, int64_t count, const int64_t* tokens,
                              int64_t group, int64_t step) {
    const auto token = [&](int64_t i) { return tokens == nullptr ? first + i : tokens[i]; };
    level.residuals.pack(rows, first, count, frame_, Metric::kDot, false, false, 0);
    const Screening screening{level.kernels, frame_, Metric::kDot, level.residuals, level.atoms, rows, atoms_};
    const int64_t threads = at::get_num_threads();
    const int64_t chunk = even_block(count, level.kernels.left_rows, level.kernels.left_panel, threads);
    const int64_t chunks = (count + chunk - 1) / chunk, blocks = (m_ + kListedColumns - 1) / kListedColumns;
    const int64_t parts = chunks >= threads ? 1 : std::min(blocks, 2 * threads / chunks);
    const int64_t per_part = (blocks + parts - 1) / parts;
    std::vector<Candidates> lists(static_cast<size_t>(count * parts), Candidates(1, level.listed));
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      Workspace w;
      for (int64_t i = begin; i < end; ++i) {
        const Near& near = near_[token(i) - group];
        if (near.count == 0 || !level.residuals.valid(i)) continue;
        const float low = screening.lower_bound(first + i, near.atoms, near.count, w);
        for (int64_t p = 0; p < parts; ++p) lists[p * count + i].raise(low);
      }
    });
    at::parallel_for(0, chunks * parts, 1, [&](int64_t begin, int64_t end) {
      Workspace w;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = t / parts * chunk, some = std::min(chunk, count - at), part = t % parts;
        Candidates* own = lists.data() + part * count + at;
        for (int64_t b = part * per_part; b < std::min(blocks, (part + 1) * per_part); ++b)
          list_candidates(screening, at, some, b * kListedColumns, std::min(kListedColumns, m_ - b * kListedColumns), 0, true,
                          false, own, w, [](int64_t, int64_t) { return true; });
      }
    });
    std::vector<char> left_over(static_cast<size_t>(count), 0);
    at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      Workspace w;
      std::vector<int32_t> found;
      for (int64_t i = begin; i < end; ++i) {
        Candidates& list = lists[i];
        for (int64_t p = 1; p < parts; ++p) list.join(lists[p * count + i]);
        if (level.residuals.valid(i)) screening.sharpen(first + i, list, w);
        left_over[i] = list.abandoned() || list.size() > level.evaluated;
        if (left_over[i] && !is_zero(token(i))) continue;
        left_over[i] = 0;
        list.rows(found);
        settle(token(i), step, found, w);
        remember(list, indices_[token(i) * steps_ + step], near_[token(i) - group]);
      }
    });
    std::vector<int64_t> rest;
    for (int64_t i = 0; i < count; ++i)
      if (left_over[i]) rest.push_back(token(i));
    return rest;
  }

  bool is_zero(int64_t t) const {
    const float* r = residual_.const_data_ptr<float>() + t * d_;
    return std::all_of(r, r + d_, [](float x) { return x == 0.0f; });
  }

  // The best of this step but for the chosen one, then those of the steps before.
  void remember(const Candidates& list, int32_t chosen, Near& near) const {
    std::vector<int32_t> best;
    list.best(kNear, best);
    best.insert(best.end(), near.atoms, near.atoms + near.count);
    near.count = 0;
    for (const int32_t atom : best)
      if (atom != chosen && near.count < kNear && std::find(near.atoms, near.atoms + near.count, atom) == near.atoms + near.count)
        near.atoms[near.count++] = atom;
  }

  // The best of `found` for token t in float32, the lowest of equals; its part leaves the residual.
  void settle(int64_t t, int64_t step, const std::vector<int32_t>& found, Workspace& w) {
    float* r = residual_.data_ptr<float>() + t * d_;
    float best = -std::numeric_limits<float>::infinity();
    int32_t index = -1;
    if (finite_row(r, d_) && first_usable_ >= 0) {
      if (is_zero(t)) best = 0.0f, index = first_usable_;
      else evaluate(r, found, w, &best, &index);
    }
    const int64_t at = t * steps_ + step;
    indices_[at] = index;
    values_[at] = index < 0 ? std::numeric_limits<float>::quiet_NaN() : best;
    if (index < 0) return;
    w.scratch_rows.resize(static_cast<size_t>(d_));
    const float* atom = atoms_.get(index, w.scratch_rows.data());
    for (int64_t c = 0; c < d_; ++c) r[c] -= best * atom[c];
  }

  void evaluate(const float* r, const std::vector<int32_t>& found, Workspace& w, float* best, int32_t* index) const {
    const ScreenKernels& kernels = screen_kernels();
    w.scratch_rows.resize(static_cast<size_t>(4 * d_));
    const float* rows[4];
    float products[4];
    for (size_t k = 0; k < found.size(); k += 4) {
      const auto some = static_cast<int64_t>(std::min<size_t>(4, found.size() - k));
      for (int64_t j = 0; j < some; ++j) rows[j] = atoms_.get(found[k + j], w.scratch_rows.data() + j * d_);
      kernels.dots(r, rows, some, d_, products);
      for (int64_t j = 0; j < some; ++j) {
        const auto value = static_cast<float>(product_in_range(products[j], r, rows[j], d_));
        const int32_t atom = found[k + j];
        if (*index < 0 || value > *best || (value == *best && atom < *index)) *best = value, *index = atom;
      }
    }
  }

  at::Tensor residual_;
  Rows rows_, atoms_;
  int64_t steps_, d_, m_;
  float* values_;
  int32_t* indices_;
  Frame frame_;
  std::unique_ptr<Level> level_, fine_;
  std::vector<char> usable_;
  int32_t first_usable_ = -1;
  std::vector<Near> near_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> matching_pursuit(const at::Tensor& x, const at::Tensor& dictionary,
                                                                int64_t steps) {
  at::Tensor residual = at::empty(x.sizes(), x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  residual.copy_(x);
  const at::Tensor atoms = dictionary.contiguous();
  const int64_t n = x.size(0);
  at::Tensor values = at::empty({n, steps}, residual.options()), indices = at::empty({n, steps}, residual.options().dtype(at::kInt));
  if (n > 0 && steps > 0) Pursuit(residual, atoms, steps, values.data_ptr<float>(), indices.data_ptr<int32_t>()).run();
  return {values, indices, residual};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("matching_pursuit", &matching_pursuit); }

}  // namespace
}  // namespace planmill
