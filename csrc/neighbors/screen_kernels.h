// The kernels behind ScreenKernels, written once over a vector type of common/vec.h.
#pragma once

#include <cstdint>

#include "common/vec.h"
#include "neighbors/screen.h"
#include "neighbors/screen_exact.h"

namespace planmill {
namespace {

constexpr float kLowest = -3.0e38f;       // below every finite v; -infinity itself is never a candidate
constexpr float kRounding = 1.0e-6f;      // float32 rounding of v and of its bound, relative to |x|^2 + |y|^2
constexpr float kUp = 1.0f + 1.0e-5f;     // rounds a computed length up
constexpr float kTiny = 1.0e-30f;         // stands for a length that underflows; data are scaled to lengths near one
constexpr float kFloor = 1.0e-36f;        // stands for products that underflow
constexpr int64_t kPairBlock = 256;       // pairs per pass: a right panel of this depth stays in the first-level cache

template <class V>
float sum_of_squares(const float* x, int64_t d) {
  typename V::F a = V::zero(), b = V::zero();
  int64_t i = 0;
  for (; i + 2 * V::kWidth <= d; i += 2 * V::kWidth) {
    const auto u = V::load(x + i), w = V::load(x + i + V::kWidth);
    a = V::fma(u, u, a);
    b = V::fma(w, w, b);
  }
  float tail = 0.0f;
  for (; i < d; ++i) tail += x[i] * x[i];
  return V::sum(V::add(a, b)) + tail;
}

template <class V>
float largest_magnitude(const float* x, int64_t d) {
  auto m = V::zero();
  int64_t i = 0;
  for (; i + V::kWidth <= d; i += V::kWidth) {
    const auto u = V::load(x + i);
    m = V::max(m, V::max(u, V::sub(V::zero(), u)));
  }
  float best = V::max_lane(m);
  for (; i < d; ++i) best = x[i] > best ? x[i] : -x[i] > best ? -x[i] : best;
  return best;
}

// Integers: |q| <= 46340 - rounding keeps every partial sum of q_x.q_y below 2^31 (Cauchy-Schwarz), |q_i| <= 32767.
template <class V>
void quantize_integers(const float* x, int64_t d, int64_t pairs, bool rounded, uint32_t* out, RowStats* stats) {
  const float squares = sum_of_squares<V>(x, d), norm = __builtin_sqrtf(squares), top = largest_magnitude<V>(x, d);
  const float room = 46338.0f - 0.5f * __builtin_sqrtf(static_cast<float>(d));
  float scale = norm > 0.0f ? room / (norm * kUp) : 0.0f;
  if (scale * top > 32766.0f) scale = 32766.0f / top;
  const float inv = scale > 0.0f ? 1.0f / scale : 0.0f;
  auto* q = reinterpret_cast<int16_t*>(out);
  float rest = 0.0f, rounded_squares = 0.0f;
  const auto vscale = V::set1(scale), vinv = V::set1(inv);
  auto vrest = V::zero(), vsquares = V::zero();
  const auto round = [&](const float* from) {
    const auto u = V::load(from);
    const auto n = V::round_to_int(V::mul(u, vscale));
    const auto back = V::mul(V::to_float(n), vinv), gap = V::sub(u, back);
    vrest = V::fma(gap, gap, vrest);
    vsquares = V::fma(back, back, vsquares);
    return n;
  };
  int64_t i = 0;
  for (; i + 2 * V::kWidth <= d; i += 2 * V::kWidth) {
    const auto first = round(x + i), second = round(x + i + V::kWidth);
    V::store_int16(q + i, first, second);
  }
  for (; i < d; ++i) {
    const float n = __builtin_rintf(x[i] * scale), gap = x[i] - n * inv;
    q[i] = static_cast<int16_t>(n);
    rest += gap * gap;
    rounded_squares += n * inv * n * inv;
  }
  for (; i < 2 * pairs; ++i) q[i] = 0;
  rest += V::sum(vrest);
  rounded_squares += V::sum(vsquares);
  *stats = {inv, 0.5f * (rounded ? rounded_squares : squares), norm * kUp + kTiny, __builtin_sqrtf(rest) * kUp + 1e-7f * norm};
}

// Words of a packed row of d 16-bit numbers, a multiple of `Multiple`.
template <int Multiple>
int64_t words_of_pairs(int64_t d) {
  return ((d + 1) / 2 + Multiple - 1) / Multiple * Multiple;
}

// Panels for vector kernels: word p of lane l at [p][l]. Blocks of 16 words keep both sides in the cache.
template <int Panel>
void put_interleaved(const uint32_t* rows, int64_t pairs, uint32_t* panel) {
  for (int64_t first = 0; first < pairs; first += 16) {
    const int64_t last = first + 16 < pairs ? first + 16 : pairs;
    for (int lane = 0; lane < Panel; ++lane)
      for (int64_t p = first; p < last; ++p) panel[p * Panel + lane] = rows[lane * pairs + p];
  }
}

// out = x * scale - centre (centre may be null), and the largest magnitude of x; infinity where x holds NaN or infinity.
template <class V>
float prepare(const float* x, int64_t d, float scale, const float* centre, float* out) {
  const auto vscale = V::set1(scale);
  auto top = V::zero(), poison = V::zero();
  int64_t i = 0;
  for (; i + V::kWidth <= d; i += V::kWidth) {
    const auto u = V::load(x + i), scaled = V::mul(u, vscale);
    top = V::max(top, V::max(u, V::sub(V::zero(), u)));
    poison = V::fma(u, V::zero(), poison);  // NaN from the first entry that is not finite on
    V::store(out + i, centre == nullptr ? scaled : V::sub(scaled, V::load(centre + i)));
  }
  float largest = V::max_lane(top), rest = V::sum(poison);
  for (; i < d; ++i) {
    const float u = x[i], magnitude = u < 0.0f ? -u : u;
    largest = magnitude > largest ? magnitude : largest;
    rest += u * 0.0f;
    out[i] = u * scale - (centre == nullptr ? 0.0f : centre[i]);
  }
  return rest == 0.0f ? largest : __builtin_inff();
}

// MR x (NV * width) products in registers over one block of pairs.
template <class V, int MR, int NV>
inline void micro(const uint32_t* left, const uint32_t* right, int64_t pairs, int32_t* out, int64_t ld, bool accumulate) {
  constexpr int W = V::kWidth;
  typename V::I acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) acc[r][c] = accumulate ? V::iload(out + r * ld + c * W) : V::izero();
  for (int64_t p = 0; p < pairs; ++p) {
    typename V::I b[NV];
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) b[c] = V::iload(reinterpret_cast<const int32_t*>(right) + (p * NV + c) * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const auto a = V::ibroadcast(left + p * MR + r);
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) acc[r][c] = V::dot_pairs(acc[r][c], a, b[c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) V::istore(out + r * ld + c * W, acc[r][c]);
}

template <class V, int MR, int NV>
void multiply_integers(const uint32_t* left, const uint32_t* right, int64_t left_panels, int64_t right_panels,
                       int64_t pairs, void* out, int64_t ld) {
  constexpr int NR = NV * V::kWidth;
  auto* c = static_cast<int32_t*>(out);
  for (int64_t j = 0; j < right_panels; ++j)
    for (int64_t p = 0; p < pairs; p += kPairBlock) {
      const int64_t depth = pairs - p < kPairBlock ? pairs - p : kPairBlock;
      for (int64_t i = 0; i < left_panels; ++i)
        micro<V, MR, NV>(left + (i * pairs + p) * MR, right + (j * pairs + p) * NR, depth, c + i * MR * ld + j * NR, ld,
                         p > 0);
    }
}

template <class V, bool Integer>
inline typename V::F raw_product(const float* t) {
  if constexpr (Integer) return V::to_float(V::iload(reinterpret_cast<const int32_t*>(t)));
  return V::load(t);
}

// The error bound of x.y for a left row against a vector of right rows: see screen.h.
template <class V>
struct Bound {
  typename V::F res, reach, own, rounding;
  explicit Bound(RowStats s)
      : res(V::set1(s.res)), reach(V::set1(s.norm + s.res)), own(V::set1(kRounding * s.norm * s.norm + kFloor)),
        rounding(V::set1(kRounding)) {}
  typename V::F operator()(const float* norm, const float* rest) const {
    const auto n = V::load(norm);
    return V::fma(n, V::fma(rounding, n, res), V::fma(reach, V::load(rest), own));
  }
};

inline RowStats stats_of(StatsView view, int64_t row) {
  return {view.inv[row], view.half[row], view.norm[row], view.res[row]};
}

template <class V, bool Integer>
void lower_bounds(float* t, int64_t rows, int64_t columns, int64_t ld, StatsView left, StatsView right, float* low_left,
                  float* low_right) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = t + r * ld;
    const RowStats own = stats_of(left, r);
    const Bound<V> bound(own);
    const auto inv = V::set1(own.inv), half = V::set1(own.half);
    auto best = V::set1(kLowest);
    for (int64_t c = 0; c < columns; c += V::kWidth) {
      const auto product = V::mul(V::mul(raw_product<V, Integer>(row + c), inv), V::load(right.inv + c));
      V::store(row + c, product);
      const auto certain = V::sub(product, bound(right.norm + c, right.res + c));
      best = V::max(V::sub(certain, V::load(right.half + c)), best);
      if (low_right != nullptr)
        V::store(low_right + c, V::max(V::sub(certain, half), V::load(low_right + c)));
    }
    const float top = V::max_lane(best);
    low_left[r] = top > low_left[r] ? top : low_left[r];
  }
}

template <class V>
Counts candidates(const float* t, int64_t columns, RowStats left, StatsView right, float threshold,
                  const float* low_right, int32_t* found, int32_t* others, float* bounds) {
  const Bound<V> bound(left);
  const auto limit = V::set1(threshold), half = V::set1(left.half);
  Counts counts{0, 0};
  for (int64_t c = 0; c < columns; c += V::kWidth) {
    const auto possible = V::add(V::load(t + c), bound(right.norm + c, right.res + c));
    uint32_t mine = V::mask_ge(V::sub(possible, V::load(right.half + c)), limit), theirs = 0;
    if (low_right != nullptr) theirs = V::mask_ge(V::sub(possible, half), V::load(low_right + c)) & ~mine;
    if ((mine | theirs) == 0) continue;
    for (; mine != 0; mine &= mine - 1) found[counts.found++] = static_cast<int32_t>(c) + __builtin_ctz(mine);
    if (theirs == 0) continue;
    float upper[V::kWidth];
    V::store(upper, V::sub(possible, half));
    for (; theirs != 0; theirs &= theirs - 1) {
      const int lane = __builtin_ctz(theirs);
      others[counts.others] = static_cast<int32_t>(c) + lane;
      bounds[counts.others++] = upper[lane];
    }
  }
  return counts;
}

// As lower_bounds, with the second largest lower bound of every row in low_left[left_step + r] and low_right[right_step + c].
template <class V, bool Integer>
void two_lower_bounds(float* t, int64_t rows, int64_t columns, int64_t ld, StatsView left, StatsView right,
                      float* low_left, int64_t left_step, float* low_right, int64_t right_step) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = t + r * ld;
    const RowStats own = stats_of(left, r);
    const Bound<V> bound(own);
    const auto inv = V::set1(own.inv), half = V::set1(own.half);
    auto best = V::set1(kLowest), second = best;
    for (int64_t c = 0; c < columns; c += V::kWidth) {
      const auto product = V::mul(V::mul(raw_product<V, Integer>(row + c), inv), V::load(right.inv + c));
      V::store(row + c, product);
      const auto certain = V::sub(product, bound(right.norm + c, right.res + c));
      const auto mine = V::sub(certain, V::load(right.half + c)), theirs = V::sub(certain, half);
      second = V::max(V::min(mine, best), second);
      best = V::max(mine, best);
      const auto column = V::load(low_right + c);
      V::store(low_right + right_step + c, V::max(V::min(theirs, column), V::load(low_right + right_step + c)));
      V::store(low_right + c, V::max(theirs, column));
    }
    float lanes[2 * V::kWidth];
    V::store(lanes, best);
    V::store(lanes + V::kWidth, second);
    float &first = low_left[r], &next = low_left[left_step + r];
    for (const float value : lanes) {
      next = value > first ? first : value > next ? value : next;
      first = value > first ? value : first;
    }
  }
}

template <class V>
int64_t list_pairs(const float* t, int64_t columns, RowStats left, StatsView right, float threshold,
                   const float* low_right, int32_t* found, float* upper) {
  const Bound<V> bound(left);
  const auto limit = V::set1(threshold), half = V::set1(left.half);
  int64_t count = 0;
  for (int64_t c = 0; c < columns; c += V::kWidth) {
    const auto possible = V::add(V::load(t + c), bound(right.norm + c, right.res + c));
    uint32_t mask = V::mask_ge(V::sub(possible, V::load(right.half + c)), limit) |
                    V::mask_ge(V::sub(possible, half), V::load(low_right + c));
    if (mask == 0) continue;
    float uppers[V::kWidth];
    V::store(uppers, possible);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      found[count] = static_cast<int32_t>(c) + lane;
      upper[count++] = uppers[lane];
    }
  }
  return count;
}

template <class V, bool Integer>
void maxima(float* t, int64_t rows, int64_t columns, int64_t ld, StatsView left, StatsView right, float* best_left,
            float* best_right) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = t + r * ld;
    const auto inv = V::set1(left.inv[r]), half = V::set1(left.half[r]);
    auto best = V::set1(kLowest);
    for (int64_t c = 0; c < columns; c += V::kWidth) {
      const auto product = V::mul(V::mul(raw_product<V, Integer>(row + c), inv), V::load(right.inv + c));
      best = V::max(V::sub(product, V::load(right.half + c)), best);
      if (best_right != nullptr)
        V::store(best_right + c, V::max(V::sub(product, half), V::load(best_right + c)));
    }
    const float top = V::max_lane(best);
    best_left[r] = top > best_left[r] ? top : best_left[r];
  }
}

template <class V, bool Integer>
int64_t group_bounds(const float* t, int64_t columns, RowStats left, StatsView right, bool bounded, float* out) {
  const Bound<V> bound(left);
  const auto inv = V::set1(left.inv);
  int64_t groups = 0;
  for (int64_t first = 0; first + 8 * V::kWidth <= columns; first += 8 * V::kWidth, groups += V::kWidth) {
    auto best = V::set1(kLowest);
    for (int64_t c = first; c < first + 8 * V::kWidth; c += V::kWidth) {
      const auto product = V::mul(V::mul(raw_product<V, Integer>(t + c), inv), V::load(right.inv + c));
      const auto value = V::sub(product, V::load(right.half + c));
      best = V::max(bounded ? V::sub(value, bound(right.norm + c, right.res + c)) : value, best);
    }
    V::store(out + groups, best);
  }
  return groups;
}

template <class V, bool Integer>
int64_t list_above(float* t, int64_t columns, RowStats left, StatsView right, bool bounded, float threshold,
                   int32_t* found, float* low, float* high) {
  const Bound<V> bound(left);
  const auto inv = V::set1(left.inv), limit = V::set1(threshold);
  int64_t count = 0;
  for (int64_t c = 0; c < columns; c += V::kWidth) {
    const auto product = V::mul(V::mul(raw_product<V, Integer>(t + c), inv), V::load(right.inv + c));
    const auto value = V::sub(product, V::load(right.half + c));
    const auto error = bounded ? bound(right.norm + c, right.res + c) : V::zero();
    const auto upper = V::add(value, error);
    uint32_t mask = V::mask_ge(upper, limit);
    if (mask == 0) continue;
    float lows[V::kWidth], highs[V::kWidth];
    V::store(lows, V::sub(value, error));
    V::store(highs, upper);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      found[count] = static_cast<int32_t>(c) + lane;
      low[count] = lows[lane];
      high[count++] = highs[lane];
    }
  }
  return count;
}

// The products become upper bounds of v. One mask for 64 columns: that there is one candidate, the usual case, costs no
// mispredicted branch.
template <class V, bool Integer>
int64_t list_nearest(float* t, int64_t columns, RowStats left, StatsView right, float* low, int32_t* found, float* rest) {
  const Bound<V> bound(left);
  const auto inv = V::set1(left.inv), lowest = V::set1(kLowest);
  auto best = V::set1(*low), others = lowest;
  for (int64_t c = 0; c < columns; c += V::kWidth) {
    const auto product = V::mul(V::mul(raw_product<V, Integer>(t + c), inv), V::load(right.inv + c));
    const auto value = V::sub(product, V::load(right.half + c)), error = bound(right.norm + c, right.res + c);
    best = V::max(V::sub(value, error), best);
    V::store(t + c, V::add(value, error));
  }
  *low = V::max_lane(best);
  const auto limit = V::set1(*low);
  int64_t count = 0;
  for (int64_t first = 0; first < columns; first += 64) {
    const int64_t last = first + 64 < columns ? first + 64 : columns;
    uint64_t mask = 0;
    for (int64_t c = first; c < last; c += V::kWidth)
      mask |= static_cast<uint64_t>(V::mask_ge(V::load(t + c), limit)) << (c - first);
    for (; mask != 0; mask &= mask - 1) found[count++] = static_cast<int32_t>(first) + __builtin_ctzll(mask);
  }
  if (rest == nullptr) return count;
  for (int64_t c = 0; c < columns; c += V::kWidth)
    others = V::max(V::where_positive(V::sub(limit, V::load(t + c)), V::load(t + c), lowest), others);
  *rest = V::max_lane(others);
  return count;
}

template <class V, int MR, int NV>
constexpr ScreenKernels integer_kernels(const char* name, int64_t left_rows) {
  return {name, MR, NV * V::kWidth, false, true, left_rows,
          &prepare<V>,
          &words_of_pairs<1>,
          &quantize_integers<V>,
          &quantize_integers<V>,
          &put_interleaved<MR>,
          &put_interleaved<NV * V::kWidth>,
          &multiply_integers<V, MR, NV>,
          &lower_bounds<V, true>,
          &candidates<V>,
          &maxima<V, true>,
          &group_bounds<V, true>,
          &list_above<V, true>,
          &two_lower_bounds<V, true>,
          &list_pairs<V>,
          &list_nearest<V, true>,
          &against_all<V, true>,
          &against_all<V, false>};
}

}  // namespace
}  // namespace planmill
