// The kernels behind EncodingKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
#include "routing/encoding.h"

namespace planmill {
namespace {

constexpr float kLeastBound = -3.0e38f;
constexpr float kBiasRounding = 1.0e-6f;

template <class V>
inline typename V::F magnitude(typename V::F x) {
  return V::max(x, V::sub(V::zero(), x));
}

// v and its error for one vector of latents.
template <class V, bool Integer, bool Absolute>
struct Scores {
  typename V::F inv, factor, slope, reach, floor, rounding;
  Latents latents;
  Scores(TokenBound t, Latents l)
      : inv(V::set1(t.inv)), factor(V::set1(t.factor)), slope(V::set1(t.slope)), reach(V::set1(t.reach)),
        floor(V::set1(t.floor)), rounding(V::set1(kBiasRounding)), latents(l) {}
  typename V::F value(const float* t, int64_t c, typename V::F* error) const {
    typename V::F raw;
    if constexpr (Integer) raw = V::to_float(V::iload(reinterpret_cast<const int32_t*>(t + c)));
    else raw = V::load(t + c);
    const auto offset = V::mul(factor, V::load(latents.bias + c));
    *error = V::fma(slope, V::load(latents.norm + c), V::fma(reach, V::load(latents.res + c), floor));
    *error = V::fma(rounding, magnitude<V>(offset), *error);
    const auto v = V::add(V::mul(V::mul(raw, inv), V::load(latents.inv + c)), offset);
    return Absolute ? magnitude<V>(v) : v;
  }
};

template <class V, bool Integer, bool Absolute>
int64_t group_bounds_of(const float* t, int64_t columns, TokenBound token, Latents latents, float* out) {
  const Scores<V, Integer, Absolute> scores(token, latents);
  int64_t groups = 0;
  for (int64_t first = 0; first + 8 * V::kWidth <= columns; first += 8 * V::kWidth, groups += V::kWidth) {
    auto best = V::set1(kLeastBound);
    for (int64_t c = first; c < first + 8 * V::kWidth; c += V::kWidth) {
      typename V::F error;
      const auto value = scores.value(t, c, &error);
      best = V::max(V::sub(value, error), best);
    }
    V::store(out + groups, best);
  }
  return groups;
}

template <class V, bool Integer, bool Absolute>
int64_t list_active_of(const float* t, int64_t columns, TokenBound token, Latents latents, float least, int32_t* found,
                       float* low, float* high) {
  const Scores<V, Integer, Absolute> scores(token, latents);
  const auto limit = V::set1(least);
  int64_t count = 0;
  for (int64_t c = 0; c < columns; c += V::kWidth) {
    typename V::F error;
    const auto value = scores.value(t, c, &error), upper = V::add(value, error);
    uint32_t mask = V::mask_ge(upper, limit);
    if (latents.theta != nullptr) mask &= V::mask_ge(upper, V::mul(scores.factor, V::load(latents.theta + c)));
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

template <class V, bool Integer>
int64_t group_bounds(const float* t, int64_t columns, TokenBound token, Latents latents, bool absolute, float* out) {
  return absolute ? group_bounds_of<V, Integer, true>(t, columns, token, latents, out)
                  : group_bounds_of<V, Integer, false>(t, columns, token, latents, out);
}

template <class V, bool Integer>
int64_t list_active(const float* t, int64_t columns, TokenBound token, Latents latents, bool absolute, float least,
                    int32_t* found, float* low, float* high) {
  return absolute ? list_active_of<V, Integer, true>(t, columns, token, latents, least, found, low, high)
                  : list_active_of<V, Integer, false>(t, columns, token, latents, least, found, low, high);
}

template <class V>
const EncodingKernels* encoding_kernels(bool integer) {
  static constexpr EncodingKernels integers = {&group_bounds<V, true>, &list_active<V, true>};
  static constexpr EncodingKernels floats = {&group_bounds<V, false>, &list_active<V, false>};
  return integer ? &integers : &floats;
}

}  // namespace
}  // namespace planmill
