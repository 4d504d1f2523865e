// The screened way of sparse_encoding: see encoding.h for the bounds.
#include "common/torch_headers.h"

#include <limits>

#include "common/cpu_capability.h"
#include "routing/encoding.h"
#include "routing/sparse_encoding_cpu.h"

namespace planmill {
namespace {

constexpr int64_t kColumns = 1024;                 // latents of a block of products
constexpr int64_t kPackedRows = 4096;              // latents packed at a time
constexpr int64_t kTokenBytes = int64_t{8} << 20;  // of tokens packed at a time
constexpr int kExponent = 60;                      // of s_x s_w: beyond, a token is evaluated without the screen
constexpr float kLargestBias = 1.0e19f;            // times 2^60 it stays finite; beyond, a latent is always evaluated
constexpr float kLeast = 1.2e-38f;                 // scores of at most 0 are not active
constexpr float kProductRounding = 1.0e-6f;        // of the arithmetic of the bounds, relative to |x||w|
constexpr float kFloor = 1.0e-15f;                 // covers rows so short that their squares underflow
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

const EncodingKernels& encoding_kernels(bool integer) {
  return choose_kernels(encoding_baseline(integer), encoding_avx2(integer), encoding_avx512(integer));
}

// What is known of one token.
struct Candidates {
  Candidates(int64_t k) : largest(k, kLeast) {}
  Shortlist largest;              // active for certain where thresholds decide; else all that may be among the k largest
  std::vector<int32_t> open;      // may or may not reach their threshold
  int64_t certain = 0;            // latents that reach their threshold
};

// A group of tokens against all latents, in slabs of packed rows.
class Pass {
 public:
  Pass(const Encoder& encoder, const Frame& frame, int64_t first, int64_t count, Packed& left, Packed& right);
  bool run();

 private:
  void note_tokens();
  void note_latents(int64_t row, int64_t rows);
  void screen(int64_t slot, int64_t count, int64_t row, int64_t rows, Workspace& w);
  void list(const float* products, int64_t ld, int64_t token, int64_t column, int64_t row, Workspace& w);
  void finish(int64_t token, RowBuffers& buffers);

  const Encoder& e_;
  const Frame& frame_;
  int64_t first_, count_;
  Packed &left_, &right_;
  const EncodingKernels& kernels_;
  std::vector<Candidates> tokens_;
  std::vector<TokenBound> bounds_;
  std::vector<char> apart_;             // tokens that the screen cannot hold
  std::vector<float> bias_, theta_;     // of the slab
  std::vector<int32_t> always_;         // latents that the screen cannot hold: evaluated for every token
  bool any_ = false;                    // a latent that it can hold was seen
};

Pass::Pass(const Encoder& encoder, const Frame& frame, int64_t first, int64_t count, Packed& left, Packed& right)
    : e_(encoder), frame_(frame), first_(first), count_(count), left_(left), right_(right),
      kernels_(encoding_kernels(encoder.screen.integer)), tokens_(static_cast<size_t>(count), Candidates(encoder.k)),
      bounds_(static_cast<size_t>(count)), apart_(static_cast<size_t>(count)),
      bias_(static_cast<size_t>(right.padded(kPackedRows))), theta_(bias_.size()) {}

void Pass::note_tokens() {
  const int64_t d = e_.x.width();
  // Rounding of a float32 inner product in lanes of four or more, as a share of |x||w|.
  const float evaluation = (static_cast<float>(d) / 4.0f + 8.0f) * 6.0e-8f;
  std::vector<float> scratch(static_cast<size_t>(d));
  for (int64_t i = 0; i < count_; ++i) {
    const StatsView s = left_.stats(i);
    const int exponent = std::ilogb(scale_of_row(e_.x.get(first_ + i, scratch.data()), d)) + std::ilogb(frame_.scale);
    apart_[i] = !left_.valid(i) || std::abs(exponent) > kExponent;
    const float factor = apart_[i] ? 0.0f : std::ldexp(1.0f, exponent);
    if (s.inv[0] == 0.0f) bounds_[i] = {0.0f, factor, 0.0f, 0.0f, 0.0f};  // a zero row: its scores are the biases
    else
      bounds_[i] = {s.inv[0], factor, s.res[0] + s.norm[0] * (kProductRounding + evaluation), s.norm[0] + s.res[0], kFloor};
  }
}

void Pass::note_latents(int64_t row, int64_t rows) {
  std::fill(bias_.begin(), bias_.end(), kNaN);
  for (int64_t c = 0; c < rows; ++c) {
    const float b = e_.bias == nullptr ? 0.0f : e_.bias[row + c];
    if (b != b || (b == -std::numeric_limits<float>::infinity() && !e_.absolute)) continue;  // never active
    if (!right_.valid(c) || std::fabs(b) > kLargestBias) {
      always_.push_back(static_cast<int32_t>(row + c));
      continue;
    }
    bias_[c] = b;
    any_ = true;
    if (e_.theta != nullptr) theta_[c] = e_.theta[row + c] < 0.0f ? 0.0f : e_.theta[row + c];
  }
}

void Pass::list(const float* products, int64_t ld, int64_t token, int64_t column, int64_t row, Workspace& w) {
  Candidates& own = tokens_[token];
  const TokenBound& bound = bounds_[token];
  const StatsView s = right_.stats(column);
  const bool decided = e_.theta == nullptr;
  const Latents latents{s.inv, s.norm, s.res, bias_.data() + column, decided ? nullptr : theta_.data() + column};
  if (decided && own.largest.threshold() <= kLeast) {
    const int64_t groups = kernels_.group_bounds(products, ld, bound, latents, e_.absolute, w.low_left.data());
    own.largest.start(w.low_left.data(), groups, 0);
  }
  const float least = decided ? own.largest.threshold() : kLeast;
  const int64_t listed = kernels_.list_active(products, ld, bound, latents, e_.absolute, least, w.found.data(),
                                              w.low_left.data(), w.low_right.data());
  for (int64_t j = 0; j < listed; ++j) {
    const int64_t c = w.found[j];
    const auto index = static_cast<int32_t>(row + column + c);
    if (!decided) {
      if (!(w.low_left[j] >= kLeast && w.low_left[j] >= bound.factor * latents.theta[c])) {
        own.open.push_back(index);
        continue;
      }
      ++own.certain;
    }
    own.largest.add(w.low_left[j], w.low_right[j], index);
  }
}

void Pass::screen(int64_t slot, int64_t count, int64_t row, int64_t rows, Workspace& w) {
  for (int64_t c = 0; c < rows; c += kColumns) {
    const int64_t ld = right_.padded(std::min(kColumns, rows - c));
    w.products.resize(static_cast<size_t>(left_.padded(count) * ld));
    w.found.resize(static_cast<size_t>(ld));
    w.low_left.resize(static_cast<size_t>(ld));
    w.low_right.resize(static_cast<size_t>(ld));
    e_.screen.multiply(left_.at(slot), right_.at(c), left_.panels(count), right_.panels(ld), left_.pairs(),
                       w.products.data(), ld);
    for (int64_t r = 0; r < count; ++r)
      if (!apart_[slot + r]) list(w.products.data() + r * ld, ld, slot + r, c, row, w);
  }
}

void Pass::finish(int64_t token, RowBuffers& buffers) {
  Candidates& own = tokens_[token];
  const int64_t d = e_.x.width(), t = first_ + token;
  std::vector<int32_t> index(own.largest.rows());
  const auto certain = static_cast<int64_t>(index.size());
  index.insert(index.end(), own.open.begin(), own.open.end());
  index.insert(index.end(), always_.begin(), always_.end());
  const auto count = static_cast<int64_t>(index.size());
  buffers.own.resize(static_cast<size_t>(d));
  buffers.values.resize(static_cast<size_t>(count));
  e_.scores(e_.x.get(t, buffers.own.data()), index.data(), count, buffers.values.data(), buffers);
  std::vector<Latent> found;
  int64_t active = own.certain;
  for (int64_t j = 0; j < count; ++j) {
    if (!e_.active(buffers.values[j], index[j])) continue;
    found.push_back(e_.latent(buffers.values[j], index[j]));
    active += j >= certain;
  }
  const int64_t kept = std::min<int64_t>(e_.k, static_cast<int64_t>(found.size()));
  std::partial_sort(found.begin(), found.begin() + kept, found.end());
  found.resize(static_cast<size_t>(kept));
  e_.write(t, found, active);
}

bool Pass::run() {
  const ScreenKernels& kernels = e_.screen;
  const int64_t m = e_.weight.count(), threads = at::get_num_threads();
  const int64_t share = round_up((count_ + threads - 1) / threads, kernels.left_panel);
  const int64_t chunk = std::min(share, even_block(count_, kernels.left_rows, kernels.left_panel, threads));
  const int64_t chunks = (count_ + chunk - 1) / chunk;
  if (!left_.pack(e_.x, first_, count_, frame_, Metric::kDot, false, false, 0)) return false;
  note_tokens();
  for (int64_t row = 0; row < m; row += kPackedRows) {
    const int64_t rows = std::min(kPackedRows, m - row);
    if (!right_.pack(e_.weight, row, rows, frame_, Metric::kL2, false, false, 0)) return false;
    note_latents(row, rows);
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      Workspace w;
      for (int64_t c = begin; c < end; ++c) screen(c * chunk, std::min(chunk, count_ - c * chunk), row, rows, w);
    });
  }
  std::vector<int64_t> plain;
  for (int64_t i = 0; i < count_; ++i)
    if (apart_[i] || !any_) plain.push_back(first_ + i);
  at::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
    RowBuffers buffers;
    for (int64_t i = begin; i < end; ++i)
      if (!apart_[i] && any_) finish(i, buffers);
  });
  e_.scan(plain);
  return true;
}

}  // namespace

bool Encoder::screen_all(const Frame& frame) const {
  const int64_t tokens = x.count(), d = x.width();
  const int64_t group = std::min(tokens, std::max(screen.left_rows, kTokenBytes / (2 * d + 64)));
  Packed left(screen, Packed::Side::kLeft, group, d);
  Packed right(screen, Packed::Side::kRight, std::min(kPackedRows, weight.count()), d);
  for (int64_t first = 0; first < tokens; first += group)
    if (!Pass(*this, frame, first, std::min(group, tokens - first), left, right).run()) return false;
  return true;
}

}  // namespace planmill
