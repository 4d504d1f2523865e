#include "neighbors/screening.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/cpu_capability.h"

namespace planmill {

const ScreenKernels& screen_kernels() {
  switch (cpu_capability()) {
    case CpuCapability::kAmx:
      return *screen_amx();
    case CpuCapability::kAvx512:
      return *screen_avx512();
    case CpuCapability::kAvx2:
      return *screen_avx2();
    default:
      return *screen_baseline();
  }
}

Rows::Rows(const at::Tensor& contiguous, int64_t d)
    : data_(contiguous.const_data_ptr()), type_(contiguous.scalar_type()), count_(d > 0 ? contiguous.numel() / d : 0), d_(d) {}

const float* Rows::get(int64_t i, float* scratch) const {
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

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLongest = 1.0e16f;  // a longer row would overflow the squares of the bounds

float largest_magnitude(const float* x, int64_t d) {  // infinity for a row that holds NaN or infinity
  float top = 0.0f;
  bool finite = true;
  for (int64_t c = 0; c < d; ++c) {
    const float magnitude = std::fabs(x[c]);
    finite &= magnitude <= std::numeric_limits<float>::max();
    top = magnitude > top ? magnitude : top;
  }
  return finite ? top : kInfinity;
}

}  // namespace

bool finite_row(const float* x, int64_t d) {
  float sum = 0.0f;
  for (int64_t c = 0; c < d; ++c) sum += 0.0f * x[c];  // NaN as soon as one entry is not finite
  return sum == 0.0f;
}

double length_of_row(const float* x, int64_t d) {
  double squares = 0.0;
  for (int64_t c = 0; c < d; ++c) squares += static_cast<double>(x[c]) * x[c];
  return std::sqrt(squares);
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
    if (metric == Metric::kCosine) weight = top > 0.0f ? 1.0 / length_of_row(x, d) : 0.0;
    for (int64_t c = 0; c < d; ++c) sum[c] += weight * x[c];
    ++used;
  }
  Frame frame;
  frame.centre.resize(static_cast<size_t>(d));
  for (int64_t c = 0; c < d; ++c) frame.centre[c] = used > 0 ? static_cast<float>(sum[c] / static_cast<double>(used)) : 0.0f;
  if (metric == Metric::kCosine) return frame;
  float reach = half_reach(rows, whole ? 1 : step, frame.centre);
  if (whole && others != nullptr) reach = std::max(reach, half_reach(*others, 1, frame.centre));
  frame.scale = power_of_two_over(reach);
  for (float& c : frame.centre) c *= frame.scale;
  return frame;
}

Packed::Packed(const ScreenKernels& kernels, Side side, int64_t capacity, int64_t d)
    : kernels_(kernels),
      side_(side),
      panel_(side == Side::kLeft ? kernels.left_panel : kernels.right_panel),
      pairs_(((d + 1) / 2 + kernels.pair_multiple - 1) / kernels.pair_multiple * kernels.pair_multiple),
      capacity_((capacity + panel_ - 1) / panel_ * panel_) {
  words_ = at::empty({capacity_, pairs_}, at::kInt);
  stats_ = at::empty({4, capacity_}, at::kFloat);
}

StatsView Packed::stats(int64_t row) const {
  float* base = stats_.data_ptr<float>() + row;
  return {base, base + capacity_, base + 2 * capacity_, base + 3 * capacity_};
}

bool Packed::valid(int64_t row) const { return stats(row).half[0] < kInfinity; }

void Packed::pad_row(int64_t slot, uint32_t* packed) const {
  const StatsView s = stats(slot);
  s.inv[0] = s.norm[0] = s.res[0] = 0.0f;
  s.half[0] = kInfinity;
  std::fill(packed, packed + pairs_, 0u);
}

void Packed::pack_row(const Rows& rows, int64_t row, const Frame& frame, Metric metric, bool shifted, bool rounded,
                      int64_t slot, float* scratch, uint32_t* packed) const {
  const int64_t d = rows.width();
  const float* x = rows.get(row, scratch);
  const float top = largest_magnitude(x, d);
  if (top == kInfinity) return pad_row(slot, packed);
  float scale = frame.scale;
  if (metric == Metric::kCosine) scale = top > 0.0f ? static_cast<float>(1.0 / length_of_row(x, d)) : 0.0f;
  if (metric == Metric::kCosine && !(scale < kInfinity)) scale = 0.0f;
  // One query's scale does not change the order of its similarities.
  if (metric == Metric::kDot && !shifted) scale = power_of_two_over(top);
  if (shifted) {
    for (int64_t c = 0; c < d; ++c) scratch[c] = x[c] * scale - frame.centre[c];
  } else {
    for (int64_t c = 0; c < d; ++c) scratch[c] = x[c] * scale;
  }
  RowStats s;
  kernels_.quantize(scratch, d, pairs_, rounded, packed, &s);
  const StatsView view = stats(slot);
  view.inv[0] = s.inv;
  view.half[0] = metric == Metric::kL2 ? s.half : 0.0f;
  view.norm[0] = s.norm;
  view.res[0] = s.res;
}

bool Packed::pack(const Rows& rows, int64_t begin, int64_t count, const Frame& frame, Metric metric, bool shifted,
                  bool rounded, int64_t at) {
  const int64_t slots = padded(count);
  std::atomic<bool> fits{true};
  at::parallel_for(0, slots / panel_, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(static_cast<size_t>(rows.width()));
    std::vector<uint32_t> packed(static_cast<size_t>(pairs_));
    for (int64_t panel = first; panel < last; ++panel) {
      uint32_t* target = words() + (at + panel * panel_) * pairs_;
      for (int64_t lane = 0; lane < panel_; ++lane) {
        const int64_t i = panel * panel_ + lane, slot = at + i;
        if (i < count) {
          pack_row(rows, begin + i, frame, metric, shifted, rounded, slot, scratch.data(), packed.data());
          if (!(stats(slot).norm[0] < kLongest)) fits = false;
        } else {
          pad_row(slot, packed.data());
        }
        (side_ == Side::kLeft ? kernels_.put_left : kernels_.put_right)(packed.data(), pairs_, static_cast<int>(lane), target);
      }
    }
  });
  return fits;
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

}  // namespace planmill
