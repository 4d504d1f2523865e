// The kernels behind SlotWeightsKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
#include "common/vec_math.h"
#include "routing/slot_weights.h"

namespace planmill {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLargestLogit = 1.0e38f;  // a difference of two logits stays finite
constexpr float kVarianceEpsilon = 1.0e-5f;
constexpr float kRowEpsilon = 1.0e-6f;

template <class V>
typename V::F where_counted(typename V::F logit, typename V::F yes, typename V::F no) {  // `no` where logit is -inf
  return V::where_positive(V::sub(logit, V::set1(kMinusInfinity)), yes, no);
}

// The logit as it counts: NaN as -inf, none above kLargestLogit.
template <class V>
typename V::F clean(typename V::F logit) {
  return V::min(V::max(logit, V::set1(kMinusInfinity)), V::set1(kLargestLogit));  // max: NaN gives its second
}

template <class V>
typename V::F load_some(const float* p, int64_t count, float filler) {
  if (count >= V::kWidth) return V::load(p);
  float x[V::kWidth];
  for (int64_t i = 0; i < V::kWidth; ++i) x[i] = i < count ? p[i] : filler;
  return V::load(x);
}

template <class V>
void store_some(float* p, int64_t count, typename V::F value) {
  if (count >= V::kWidth) return V::store(p, value);
  float x[V::kWidth];
  V::store(x, value);
  for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}

// Two vectors of columns of one image: the tokens that count, cleaned, packed into `x` [count, block].
template <class V>
struct Columns {
  static constexpr int64_t kBlock = 2 * V::kWidth;
  using F = typename V::F;
  const SlotImage& image;
  int64_t first;
  float* x;
  int64_t count = 0;

  int64_t slots(int64_t v) const { return image.slots - first - v * V::kWidth; }

  void gather(F* top) {
    top[0] = top[1] = V::set1(kMinusInfinity);
    for (int64_t n = 0; n < image.tokens; ++n) {
      if (image.mask != nullptr && image.mask[n] == 0) continue;
      const auto scale = V::set1(image.scale == nullptr ? 1.0f : image.scale[n]);
      for (int64_t v = 0; v < 2; ++v) {
        if (slots(v) <= 0) break;
        const float* p = image.logits + n * image.slots + first + v * V::kWidth;
        const F logit = clean<V>(V::mul(load_some<V>(p, slots(v), 0.0f), scale));
        V::store(x + count * kBlock + v * V::kWidth, logit);
        top[v] = V::max(top[v], logit);
      }
      ++count;
    }
  }

  // The mean in two parts, the highest logit and the rest: logits far from zero lose nothing, and equal ones have deviation
  // exactly 0. The inverse deviation is found on deviations brought below one: their squares do not overflow.
  void moments(int64_t v, F top) const {
    const float* column = x + v * V::kWidth;
    const F zero = V::zero(), one = V::set1(1.0f);
    F counted = zero, low = zero, widest = V::set1(1.0e-15f), squares = zero;
    for (int64_t n = 0; n < count; ++n)
      counted = V::add(counted, where_counted<V>(V::load(column + n * kBlock), one, zero));
    const F share = V::div(one, V::max(counted, one)), high = where_counted<V>(top, top, zero);
    for (int64_t n = 0; n < count; ++n) {
      const F logit = V::load(column + n * kBlock);
      low = V::add(low, where_counted<V>(logit, V::mul(V::sub(logit, high), share), zero));
    }
    const auto deviation = [&](int64_t n) {
      const F logit = V::load(column + n * kBlock);
      return where_counted<V>(logit, V::sub(V::sub(logit, high), low), zero);
    };
    for (int64_t n = 0; n < count; ++n) {
      const F d = deviation(n);
      widest = V::max(widest, V::max(d, V::sub(zero, d)));
    }
    const F unit = V::div(one, widest);
    for (int64_t n = 0; n < count; ++n) {
      const F d = V::mul(deviation(n), unit);
      squares = V::fma(d, d, squares);
    }
    float variance[V::kWidth], inverse[V::kWidth], to_unit[V::kWidth];
    V::store(variance, V::fma(V::mul(V::set1(kVarianceEpsilon), unit), unit, V::mul(squares, share)));
    V::store(to_unit, unit);
    for (int i = 0; i < V::kWidth; ++i) inverse[i] = to_unit[i] / __builtin_sqrtf(variance[i]);
    const int64_t at = first + v * V::kWidth;
    V::store(image.shift + at, high);
    V::store(image.rest + at, low);
    V::store(image.inverse + at, V::load(inverse));
  }

  void softmax(int64_t v, F top, float* e) const {
    const F shift = V::max(top, V::set1(-kLargestLogit));
    F sum = V::zero();
    for (int64_t n = 0; n < count; ++n) {
      const F value = exp_below<V>(V::sub(V::load(x + n * kBlock + v * V::kWidth), shift));
      V::store(e + n * kBlock + v * V::kWidth, value);
      sum = V::add(sum, value);
    }
    const F share = V::div(V::set1(1.0f), V::max(sum, V::set1(1.0f)));
    int64_t row = 0;
    for (int64_t n = 0; n < image.tokens; ++n) {
      float* out = image.dispatch + n * image.slots + first + v * V::kWidth;
      if (image.mask != nullptr && image.mask[n] == 0) {
        store_some<V>(out, slots(v), V::zero());
        continue;
      }
      F value = V::mul(V::load(e + row * kBlock + v * V::kWidth), share);
      if (image.scale_dispatch) {
        const F logit = V::load(x + row * kBlock + v * V::kWidth);
        value = where_counted<V>(logit, V::mul(value, V::set1(image.scale[n])), V::zero());
      }
      store_some<V>(out, slots(v), value);
      ++row;
    }
  }

  // A column without any logit that counts is NaN if all its logits are, zero otherwise.
  void settle_empty(int64_t v, F top) const {
    float highest[V::kWidth];
    V::store(highest, top);
    for (int64_t j = 0; j < V::kWidth && j < slots(v); ++j) {
      if (highest[j] > kMinusInfinity || count == 0) continue;
      const int64_t s = first + v * V::kWidth + j;
      const auto nan = [&](int64_t n) {
        const float logit = image.logits[n * image.slots + s] * (image.scale == nullptr ? 1.0f : image.scale[n]);
        return __builtin_isnan(logit) || (image.mask != nullptr && image.mask[n] == 0);
      };
      bool all = true;
      for (int64_t n = 0; n < image.tokens && all; ++n) all = nan(n);
      for (int64_t n = 0; n < image.tokens && all; ++n) image.dispatch[n * image.slots + s] = __builtin_nanf("");
    }
  }
};

template <class V>
void slot_columns(const SlotImage& image, int64_t first, float* scratch) {
  Columns<V> columns{image, first, scratch};
  typename V::F top[2];
  columns.gather(top);
  float* e = scratch + image.tokens * Columns<V>::kBlock;
  for (int64_t v = 0; v < 2 && columns.slots(v) > 0; ++v) {
    if (image.shift != nullptr) columns.moments(v, top[v]);
    columns.softmax(v, top[v], e);
    columns.settle_empty(v, top[v]);
  }
}

// x[s] = e^(L - max) and their sum
template <class V>
float exponentials(float* x, int64_t padded, float top) {
  const auto shift = V::set1(top > -kLargestLogit ? top : -kLargestLogit);
  auto sum = V::zero();
  for (int64_t s = 0; s < padded; s += V::kWidth) {
    const auto value = exp_below<V>(V::sub(V::load(x + s), shift));
    V::store(x + s, value);
    sum = V::add(sum, value);
  }
  const float total = V::sum(sum);
  return total > 1.0f ? total : 1.0f;
}

// x[s] = phi(standardised L) and their sum
template <class V>
float features(const SlotImage& image, float* x, int64_t padded) {
  const auto zero = V::zero();
  auto sum = zero;
  for (int64_t s = 0; s < padded; s += V::kWidth) {
    const auto logit = V::load(x + s);
    const auto centred = V::sub(V::sub(logit, V::load(image.shift + s)), V::load(image.rest + s));
    const auto h = V::mul(centred, V::load(image.inverse + s));
    const auto phi = V::where_positive(h, V::add(h, V::set1(1.0f)), exp_below<V>(V::min(h, zero)));
    const auto value = where_counted<V>(logit, phi, zero);
    V::store(x + s, value);
    sum = V::add(sum, value);
  }
  return V::sum(sum) + kRowEpsilon;
}

template <class V>
void slot_rows(const SlotImage& image, int64_t first, int64_t last, float* x) {
  const int64_t slots = image.slots, padded = (slots + V::kWidth - 1) / V::kWidth * V::kWidth;
  for (int64_t n = first; n < last; ++n) {
    float* out = image.combine + n * slots;
    if (image.mask != nullptr && image.mask[n] == 0) {
      for (int64_t s = 0; s < slots; ++s) out[s] = 0.0f;
      continue;
    }
    const float* logits = image.logits + n * slots;
    const auto scale = V::set1(image.scale == nullptr ? 1.0f : image.scale[n]);
    auto top = V::set1(kMinusInfinity);
    for (int64_t s = 0; s < slots; s += V::kWidth) {
      const auto logit = clean<V>(V::mul(load_some<V>(logits + s, slots - s, __builtin_nanf("")), scale));
      V::store(x + s, logit);
      top = V::max(top, logit);
    }
    const float highest = V::max_lane(top);
    const float sum = image.shift == nullptr ? exponentials<V>(x, padded, highest) : features<V>(image, x, padded);
    const auto share = V::set1(1.0f / sum);
    for (int64_t s = 0; s < slots; s += V::kWidth) store_some<V>(out + s, slots - s, V::mul(V::load(x + s), share));
    if (highest > kMinusInfinity) continue;
    bool all = true;
    for (int64_t s = 0; s < slots; ++s) {
      const float logit = logits[s] * (image.scale == nullptr ? 1.0f : image.scale[n]);
      all = all && __builtin_isnan(logit);
    }
    for (int64_t s = 0; s < slots && all; ++s) out[s] = __builtin_nanf("");
  }
}

template <class V>
constexpr SlotWeightsKernels slot_weights_kernels() {
  return {Columns<V>::kBlock, &slot_columns<V>, &slot_rows<V>};
}

}  // namespace
}  // namespace planmill
