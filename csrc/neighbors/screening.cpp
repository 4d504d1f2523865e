#include "common/torch_headers.h"

#include <atomic>
#include <cstring>
#include <limits>

#include "common/cpu_capability.h"
#include "neighbors/screening.h"

namespace planmill {
namespace {

constexpr int64_t kFloatRows = 128;

}  // namespace

const ScreenKernels& screen_kernels() {
  return choose_kernels(screen_baseline(), screen_avx2(), screen_avx512(), screen_amx());
}

const ScreenKernels& screen_kernels(int64_t left_rows, int64_t right_rows) {
  if (std::min(left_rows, right_rows) >= kFloatRows) return screen_kernels();
  return choose_kernels(screen_floats_baseline(), screen_floats_avx2(), screen_floats_avx512());
}

const ScreenKernels& coarse_kernels() {
  switch (cpu_capability()) {
    case CpuCapability::kAvx512:
      return *screen_bytes_avx512();
    case CpuCapability::kAvx2:
      return *screen_bytes_avx2();
    default:  // AMX has the rate of bytes in 16 bits; SSE2 cannot multiply bytes
      return screen_kernels();
  }
}

Rows::Rows(const at::Tensor& contiguous, int64_t d)
    : data_(contiguous.const_data_ptr()), type_(contiguous.scalar_type()), count_(d > 0 ? contiguous.numel() / d : 0), d_(d) {}

Rows::Rows(const at::Tensor& contiguous, int64_t d, const int32_t* chosen, int64_t count)
    : data_(contiguous.const_data_ptr()), type_(contiguous.scalar_type()), count_(count), d_(d), chosen_(chosen) {}

Rows::Rows(const Rows* first, double first_length, const Rows* second, double second_length)
    : count_(first->count()), d_(first->width() + second->width()), parts_{first, second},
      part_lengths_{first_length, second_length} {}

const float* Rows::put_together(int64_t i, float* scratch) const {
  float* out = scratch;
  for (int p = 0; p < 2; ++p) {
    const int64_t d = parts_[p]->width();
    if (d == 0) continue;
    const float* x = parts_[p]->get(i, out);
    const double length = parts_[p]->length(i, x), scale = part_lengths_[p] / length;
    if (!(length > 0.0 && std::isfinite(length))) {
      scratch[0] = std::numeric_limits<float>::quiet_NaN();
      return scratch;
    }
    if (scale > 1.0e-30 && scale < 1.0e30) {
      const auto factor = static_cast<float>(scale);
      for (int64_t c = 0; c < d; ++c) out[c] = x[c] * factor;
    } else {  // such a factor would leave float32's range, or come near its end
      for (int64_t c = 0; c < d; ++c) out[c] = static_cast<float>(x[c] * scale);
    }
    out += d;
  }
  return scratch;
}

void Rows::measure() {
  lengths_.resize(static_cast<size_t>(count_));
  at::parallel_for(0, count_, std::max<int64_t>(1, 32768 / std::max<int64_t>(d_, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(d_));
    for (int64_t i = begin; i < end; ++i) lengths_[i] = length_of_row(get(i, scratch.data()), d_);
  });
}

double Rows::length(int64_t i, const float* x) const { return lengths_.empty() ? length_of_row(x, d_) : lengths_[i]; }

const float* Rows::get(int64_t i, float* scratch) const {
  if (parts_[0] != nullptr) return put_together(i, scratch);
  if (chosen_ != nullptr) i = chosen_[i];
  if (type_ == at::kFloat) return static_cast<const float*>(data_) + i * d_;
  if (type_ == at::kBFloat16) {
    const auto* bits = static_cast<const uint16_t*>(data_) + i * d_;
    auto* words = reinterpret_cast<uint32_t*>(scratch);
    for (int64_t c = 0; c < d_; ++c) words[c] = static_cast<uint32_t>(bits[c]) << 16;
    return scratch;
  }
  const auto* row = static_cast<const at::Half*>(data_) + i * d_;
  for (int64_t c = 0; c < d_; ++c) scratch[c] = static_cast<float>(row[c]);
  return scratch;
}

void Rows::fetch(int64_t i) const {
  const int64_t bytes = d_ * static_cast<int64_t>(c10::elementSize(type_));
  const char* row = static_cast<const char*>(data_) + i * bytes;
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
}

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Magnitudes of floats are ordered like their bits, which vectorises on every processor.
int32_t largest_bits(const float* x, int64_t d) {
  int32_t top = 0;
  for (int64_t c = 0; c < d; ++c) {
    int32_t bits;
    std::memcpy(&bits, x + c, sizeof(bits));
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  return top;
}

float largest_magnitude(const float* x, int64_t d) {  // infinity for a row that holds NaN or infinity
  const int32_t bits = largest_bits(x, d);
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  return bits < 0x7f800000 ? top : kInfinity;
}

}  // namespace

bool finite_row(const float* x, int64_t d) { return largest_bits(x, d) < 0x7f800000; }

double length_of_row(const float* x, int64_t d) {
  double squares[8] = {};
  int64_t c = 0;
  for (; c + 8 <= d; c += 8)
    for (int64_t k = 0; k < 8; ++k) squares[k] += static_cast<double>(x[c + k]) * x[c + k];
  for (; c < d; ++c) squares[0] += static_cast<double>(x[c]) * x[c];
  double sum = 0.0;
  for (const double part : squares) sum += part;
  return std::sqrt(sum);
}

namespace {

// The largest distance of a coordinate from the centre, halved so that it cannot overflow.
float half_reach(const Rows& rows, int64_t step, const std::vector<float>& centre) {
  std::vector<float> scratch(centre.size());
  float reach = 0.0f;
  for (int64_t i = 0; i < rows.count(); i += step) {
    const float* x = rows.get(i, scratch.data());
    float far = 0.0f;
    for (size_t c = 0; c < centre.size(); ++c) far = std::max(far, std::fabs(0.5f * x[c] - 0.5f * centre[c]));
    if (largest_magnitude(x, rows.width()) < kInfinity) reach = std::max(reach, far);
  }
  return reach;
}

// 2^k with largest * 2^k near one.
float power_of_two_over(float largest) {
  int exponent = 0;
  if (largest > 0.0f) std::frexp(largest, &exponent);
  return std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
}

}  // namespace

Frame frame_of(const Rows& rows, Metric metric, const Rows* others, bool whole) {
  const int64_t n = rows.count(), d = rows.width(), step = std::max<int64_t>(1, n / 256);
  std::vector<float> scratch(static_cast<size_t>(d));
  std::vector<double> sum(static_cast<size_t>(d));
  int64_t used = 0;
  for (int64_t i = 0; i < n; i += step) {
    const float* x = rows.get(i, scratch.data());
    const float top = largest_magnitude(x, d);
    if (top == kInfinity) continue;
    double weight = 1.0;
    if (metric == Metric::kCosine) weight = top > 0.0f ? 1.0 / rows.length(i, x) : 0.0;
    for (int64_t c = 0; c < d; ++c) sum[c] += weight * x[c];
    ++used;
  }
  Frame frame;
  frame.centre.resize(static_cast<size_t>(d));
  for (int64_t c = 0; c < d; ++c) frame.centre[c] = used > 0 ? static_cast<float>(sum[c] / static_cast<double>(used)) : 0.0f;
  const auto finish = [&] {  // a float32 product of rows that are a centre apart from where they are screened
    const auto sums = static_cast<float>(d) * 0.25f + 16.0f;
    if (metric != Metric::kL2) frame.rounding = 6.0e-8f * sums * static_cast<float>(length_of_row(frame.centre.data(), d));
    return frame;
  };
  if (metric == Metric::kCosine) return finish();
  float reach = half_reach(rows, whole ? 1 : step, frame.centre);
  if (whole && others != nullptr) reach = std::max(reach, half_reach(*others, 1, frame.centre));
  frame.scale = power_of_two_over(reach);
  for (float& c : frame.centre) c *= frame.scale;
  return finish();
}

Frame frame_at_origin(const Rows& rows, bool whole) {
  Frame frame;
  frame.centre.resize(static_cast<size_t>(rows.width()));
  frame.scale = power_of_two_over(half_reach(rows, whole ? 1 : std::max<int64_t>(1, rows.count() / 256), frame.centre));
  return frame;
}

float scale_of_row(const float* x, int64_t d) { return power_of_two_over(largest_magnitude(x, d)); }

int64_t even_block(int64_t rows, int64_t most, int64_t panel, int64_t threads) {
  int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
  if (blocks > threads) blocks = round_up(blocks, threads);
  return round_up((rows + blocks - 1) / blocks, panel);
}

Packed::Packed(const ScreenKernels& kernels, Side side, int64_t capacity, int64_t d)
    : kernels_(kernels),
      side_(side),
      panel_(side == Side::kLeft ? kernels.left_panel : kernels.right_panel),
      pairs_(kernels.words(d)),
      capacity_((capacity + panel_ - 1) / panel_ * panel_) {
  words_ = at::empty({capacity_, pairs_}, at::kInt);
  numbers_ = at::empty({4, capacity_}, at::kFloat);
  packed_ = reinterpret_cast<uint32_t*>(words_.data_ptr<int32_t>());
  stats_ = numbers_.data_ptr<float>();
}

bool Packed::valid(int64_t row) const { return stats(row).half[0] < kInfinity; }

void Packed::pad_row(int64_t slot, uint32_t* packed) const {
  const StatsView s = stats(slot);
  s.inv[0] = s.norm[0] = s.res[0] = 0.0f;
  s.half[0] = kInfinity;
  std::fill(packed, packed + pairs_, 0u);
}

bool Packed::prepare(const Rows& rows, int64_t row, const Frame& frame, Metric metric, bool shifted, float* out) const {
  const int64_t d = rows.width();
  const float* x = rows.get(row, out);
  float scale = frame.scale;
  if (metric == Metric::kCosine) {
    double length = rows.length(row, x);
    if (length > 1.0e30 || (length < 1.0e-30 && length > 0.0)) {  // 1 / length would leave float32's range
      const float first = length > 1.0 ? 0x1p-90f : 0x1p90f;
      kernels_.prepare(x, d, first, nullptr, out);
      x = out;
      length *= first;
    }
    scale = length > 0.0 ? static_cast<float>(1.0 / length) : 0.0f;
  } else if (metric == Metric::kDot && !shifted) {  // a query's scale does not change the order of its similarities
    scale = scale_of_row(x, d);
  }
  return kernels_.prepare(x, d, scale, shifted ? frame.centre.data() : nullptr, out) < kInfinity;
}

void Packed::pack_row(const Rows& rows, int64_t row, const Frame& frame, Metric metric, bool shifted, bool rounded,
                      int64_t slot, float* scratch, uint32_t* packed) const {
  const int64_t d = rows.width();
  if (!prepare(rows, row, frame, metric, shifted, scratch)) return pad_row(slot, packed);
  RowStats s;
  (side_ == Side::kLeft ? kernels_.quantize_left : kernels_.quantize_right)(scratch, d, pairs_, rounded, packed, &s);
  const StatsView view = stats(slot);
  view.inv[0] = s.inv;
  view.half[0] = metric == Metric::kL2 ? s.half : 0.0f;
  view.norm[0] = s.norm;
  view.res[0] = shifted && metric != Metric::kL2 ? s.res + frame.rounding : s.res;
}

bool Packed::pack(const Rows& rows, int64_t begin, int64_t count, const Frame& frame, Metric metric, bool shifted,
                  bool rounded, int64_t at) {
  const int64_t slots = padded(count);
  std::atomic<bool> fits{true};
  at::parallel_for(0, slots / panel_, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(static_cast<size_t>(rows.width()));
    std::vector<uint32_t> packed(static_cast<size_t>(panel_ * pairs_));
    const bool in_place = side_ == Side::kLeft && kernels_.rows_behind;
    for (int64_t panel = first; panel < last; ++panel) {
      uint32_t* const panel_words = packed_ + (at + panel * panel_) * pairs_;
      for (int64_t lane = 0; lane < panel_; ++lane) {
        const int64_t i = panel * panel_ + lane, slot = at + i;
        uint32_t* target = (in_place ? panel_words : packed.data()) + lane * pairs_;
        if (i >= count) {
          pad_row(slot, target);
          continue;
        }
        float* prepared = in_place ? reinterpret_cast<float*>(target) : scratch.data();
        pack_row(rows, begin + i, frame, metric, shifted, rounded, slot, prepared, target);
        if (!(stats(slot).norm[0] < kLongest)) fits = false;
      }
      if (!in_place) (side_ == Side::kLeft ? kernels_.put_left : kernels_.put_right)(packed.data(), pairs_, panel_words);
    }
  });
  return fits;
}

void Block::evaluate(int64_t row, int64_t first, const int32_t* index, int64_t count, Workspace& w, float* values) const {
  if (count == 0) return;
  const int64_t d = left_rows.width();
  w.scratch.resize(static_cast<size_t>(d));
  w.scratch_rows.resize(static_cast<size_t>(4 * d));
  const float* x = left_rows.get(row, w.scratch.data());
  const float* y[4];
  for (int64_t k = 0; k < count; k += 4, values += 4) {
    const int64_t some = std::min<int64_t>(4, count - k);
    for (int64_t j = 0; j < some; ++j) y[j] = right_rows.get(first + index[k + j], w.scratch_rows.data() + j * d);
    (metric == Metric::kL2 ? kernels.squared_distances : kernels.dots)(x, y, some, d, values);
    for (int64_t j = 0; j < some; ++j) {
      if (metric == Metric::kL2) {
        values[j] = distance_from_square(values[j], x, y[j], d);
        continue;
      }
      double product = product_in_range(values[j], x, y[j], d);
      if (metric == Metric::kCosine) product *= left_inverse[row] * right_inverse[first + index[k + j]];
      values[j] = static_cast<float>(product);
    }
  }
}

float distance_from_square(float square, const float* x, const float* y, int64_t d) {
  if (square > 1.0e-30f && square < 1.0e37f) return std::sqrt(square);
  if (square == 0.0f && std::memcmp(x, y, static_cast<size_t>(d) * sizeof(float)) == 0) return 0.0f;
  double squares = 0.0;
  for (int64_t c = 0; c < d; ++c) {
    const double gap = static_cast<double>(x[c]) - y[c];
    squares += gap * gap;
  }
  return static_cast<float>(std::sqrt(squares));
}

double product_in_range(float product, const float* x, const float* y, int64_t d) {
  const float magnitude = std::fabs(product);
  if (magnitude > 1.0e-30f && magnitude < 1.0e37f) return product;
  double sum = 0.0;
  for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(x[c]) * y[c];
  return sum;
}

}  // namespace planmill
