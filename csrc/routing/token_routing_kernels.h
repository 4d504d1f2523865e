// The kernel behind RoutingKernels, written once over a vector type of common/vec.h.
//
// A row of logits stays in the first-level cache: scores if the choice or the weights need them, groups, then the k best
// one by one. Maxima of blocks of 64 are kept, so that taking one costs a look at those and at one block. What was taken
// becomes NaN, which no maximum sees. The k weights come last, from the chosen logits.
#pragma once

#include "common/vec.h"
#include "common/vec_math.h"
#include "routing/token_routing.h"

namespace planmill {
namespace {

constexpr float kNothing = -__builtin_inff();

template <class V>
float block_max(const float* x, int64_t n) {  // NaN is not seen
  auto best = V::set1(kNothing);
  for (int64_t i = 0; i < n; i += V::kWidth) best = V::max(V::load(x + i), best);
  return V::max_lane(best);
}

// e^x; 0 below e^-87: subnormal numbers cost hundreds of cycles, and the padding is at -inf.
template <class V>
typename V::F exp_or_zero(typename V::F x) {
  const auto least = V::set1(-87.0f);
  return V::where_positive(V::sub(x, least), exp<V>(V::max(x, least)), V::zero());
}

// e^(x - m) and their sum: x = m counts as e^0, also where both are infinite.
template <class V>
float exponentials(const float* x, float* out, int64_t n, float m) {
  float total = 0.0f;
  if (m == kNothing) {
    for (int64_t i = 0; i < n; ++i) out[i] = 0.0f;
    return 0.0f;
  }
  if (m == -kNothing) {
    for (int64_t i = 0; i < n; ++i) total += out[i] = x[i] == m ? 1.0f : 0.0f;
    return total;
  }
  auto sum = V::zero();
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const auto e = exp_or_zero<V>(V::sub(V::load(x + i), V::set1(m)));
    V::store(out + i, e);
    sum = V::add(sum, e);
  }
  return V::sum(sum);
}

template <class V>
void sigmoids(const float* x, float* out, int64_t n) {
  const auto one = V::set1(1.0f);
  for (int64_t i = 0; i < n; i += V::kWidth)
    V::store(out + i, V::div(one, V::add(one, exp<V>(V::sub(V::zero(), V::load(x + i))))));
}

inline int64_t lowest_largest(const float* x, int64_t n) {  // NaN is not seen
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i)
    if (x[i] == x[i] && (best < 0 || x[i] > x[best])) best = i;
  return best;
}

// Offers of experts outside the best groups become 0 or -inf. A group counts as much as its two largest offers.
inline void shut_groups(const Routing& r, float* q, float* count) {
  const int64_t size = r.experts / r.groups;
  for (int64_t g = 0; g < r.groups; ++g) {
    float first = kNothing, second = kNothing;
    for (const float* x = q + g * size; x < q + (g + 1) * size; ++x) {
      second = *x > first ? first : *x > second ? *x : second;
      first = *x > first ? *x : first;
    }
    count[g] = second == kNothing ? first : first + second;
  }
  for (int64_t j = 0; j < r.top_groups; ++j) count[lowest_largest(count, r.groups)] = __builtin_nanf("");
  for (int64_t g = 0; g < r.groups; ++g) {
    if (count[g] != count[g]) continue;  // chosen
    for (float* x = q + g * size; x < q + (g + 1) * size; ++x)
      *x = r.mask_with_zero && *x != kNothing ? 0.0f : kNothing;
  }
}

// The k largest of q [padded], ties to the lower index; `chosen`: their logits, -inf where only -inf was left.
template <class V>
void take_best(const Routing& r, const float* l, float* q, int64_t padded, float* maxima, int32_t* indices,
               float* chosen) {
  const int64_t span = padded < kRoutingBlock ? padded : kRoutingBlock, blocks = padded / span;
  for (int64_t b = 0; b < blocks; ++b) maxima[b] = block_max<V>(q + b * span, span);
  int64_t j = 0;
  for (; j < r.k; ++j) {
    const int64_t b = blocks == 1 ? 0 : lowest_largest(maxima, blocks);
    const float best = maxima[b];
    if (best == kNothing) break;
    float* block = q + b * span;
    int64_t i = 0;
    uint32_t found = 0;
    for (; found == 0; i += V::kWidth) found = V::mask_ge(V::load(block + i), V::set1(best));
    i += __builtin_ctz(found) - V::kWidth;
    block[i] = __builtin_nanf("");
    maxima[b] = block_max<V>(block, span);
    indices[j] = static_cast<int32_t>(b * span + i);
    chosen[j] = l[indices[j]];
  }
  for (int64_t e = 0; j < r.k; ++e) {
    if (q[e] != q[e]) continue;
    indices[j] = static_cast<int32_t>(e);
    chosen[j++] = kNothing;
  }
}

// `top`, `total`: largest logit of the row and the sum of e^(l - top), where the softmax is over all experts.
template <class V>
void weigh(const Routing& r, float* chosen, float top, float total, float* weights) {
  const int64_t padded = (r.k + V::kWidth - 1) / V::kWidth * V::kWidth;
  for (int64_t j = r.k; j < padded; ++j) chosen[j] = kNothing;
  float largest = kNothing;
  for (int64_t j = 0; j < r.k; ++j) largest = chosen[j] > largest ? chosen[j] : largest;
  const bool over_chosen = r.topk_first || (!r.sigmoid && r.renormalize && r.eps == 0.0f);
  float divisor = 1.0f;
  if (over_chosen) {
    divisor = exponentials<V>(chosen, chosen, padded, largest);
  } else if (!r.sigmoid) {
    divisor = total;
    const float sum = exponentials<V>(chosen, chosen, padded, top);
    if (r.renormalize) divisor = sum + r.eps * total;
  } else if (!r.renormalize || largest > -60.0f) {
    sigmoids<V>(chosen, chosen, padded);
    float sum = 0.0f;
    for (int64_t j = 0; j < r.k; ++j) sum += chosen[j];
    if (r.renormalize) divisor = sum + r.eps;
  } else {  // here the sigmoid of x is e^x
    const float sum = exponentials<V>(chosen, chosen, padded, largest);
    float shift[V::kWidth];
    V::store(shift, exp<V>(V::set1(-largest)));
    divisor = r.eps > 0.0f ? sum + r.eps * shift[0] : sum;
  }
  const float factor = divisor == 0.0f ? 0.0f : r.scale;  // 0 / 0: nothing could be chosen
  divisor = divisor == 0.0f ? 1.0f : divisor;
  for (int64_t j = 0; j < r.k; ++j) weights[j] = chosen[j] / divisor * factor;
}

// Offers q of the experts from their logits l. `total`: sum of e^(l - top), found where it is needed.
template <class V>
void make_offers(const Routing& r, const float* l, float* q, int64_t padded, float top, float* total) {
  const bool by_score = !r.topk_first && (r.bias != nullptr || r.groups > 1);
  if (!r.topk_first && !r.sigmoid && (by_score || !r.renormalize || r.eps != 0.0f))
    *total = exponentials<V>(l, q, padded, top);
  if (!by_score) {
    for (int64_t e = 0; e < padded; e += V::kWidth) V::store(q + e, V::load(l + e));
  } else if (r.sigmoid) {
    sigmoids<V>(l, q, padded);
  } else {
    const auto share = V::set1(*total == 0.0f ? 0.0f : 1.0f / *total);
    for (int64_t e = 0; e < padded; e += V::kWidth) V::store(q + e, V::mul(V::load(q + e), share));
  }
  if (r.bias != nullptr)
    for (int64_t e = 0; e < r.experts; ++e) q[e] += r.bias[e];
  if (!by_score && r.bias == nullptr) return;
  const auto nothing = V::set1(kNothing);
  for (int64_t e = 0; e < padded; e += V::kWidth) {  // -inf where l is, or where q is NaN
    const auto finite = V::sub(V::load(l + e), nothing);
    V::store(q + e, V::where_positive(finite, V::max(V::load(q + e), nothing), nothing));
  }
}

template <class V>
void route(const Routing& r, const float* logits, int64_t tokens, float* scratch, int32_t* indices, float* weights) {
  const int64_t n = r.experts, padded = routing_width(n), whole = n / V::kWidth * V::kWidth;
  float *l = scratch, *q = l + padded, *maxima = q + padded, *count = maxima + padded / kRoutingBlock + 1;
  float* chosen = count + r.groups;
  const auto nothing = V::set1(kNothing);
  for (int64_t e = n; e < padded; ++e) l[e] = kNothing;
  for (int64_t t = 0; t < tokens; ++t, logits += n, indices += r.k, weights += r.k) {
    for (int64_t e = 0; e < whole; e += V::kWidth) V::store(l + e, V::max(V::load(logits + e), nothing));  // NaN: -inf
    for (int64_t e = whole; e < n; ++e) l[e] = logits[e] > kNothing ? logits[e] : kNothing;
    const float top = block_max<V>(l, padded);
    float total = 0.0f;
    make_offers<V>(r, l, q, padded, top, &total);
    if (r.groups > 1) shut_groups(r, q, count);
    take_best<V>(r, l, q, padded, maxima, indices, chosen);
    weigh<V>(r, chosen, top, total, weights);
    if (top != kNothing) continue;
    int64_t missing = 0;
    while (missing < n && logits[missing] != logits[missing]) ++missing;
    for (int64_t j = 0; j < r.k && missing == n; ++j) weights[j] = __builtin_nanf("");
  }
}

template <class V>
constexpr RoutingKernels routing_kernels() {
  return {&route<V>};
}

}  // namespace
}  // namespace planmill
