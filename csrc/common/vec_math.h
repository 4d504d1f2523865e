// Elementary functions over a vector type of common/vec.h. NaN gives NaN.
#pragma once

#include "common/vec.h"

namespace planmill {
namespace {

// e^x within 1.2e-7 of it, over all of float32: 0 and infinity where it leaves the range, subnormal numbers before that.
template <class V>
typename V::F exp(typename V::F x) {
  using F = typename V::F;
  // NaN passes both: max and min give their second operand where the comparison is false
  x = V::min(V::set1(89.0f), V::max(V::set1(-104.0f), x));
  const F n = V::to_float(V::round_to_int(V::mul(x, V::set1(1.44269504f))));
  F r = V::fma(n, V::set1(-0.693145752f), x);  // ln 2 in two parts: n times the first is exact
  r = V::fma(n, V::set1(-1.42860677e-6f), r);
  F p = V::set1(1.0f / 5040);
  p = V::fma(p, r, V::set1(1.0f / 720));
  p = V::fma(p, r, V::set1(1.0f / 120));
  p = V::fma(p, r, V::set1(1.0f / 24));
  p = V::fma(p, r, V::set1(1.0f / 6));
  p = V::fma(p, r, V::set1(0.5f));
  p = V::fma(p, r, V::set1(1.0f));
  p = V::fma(p, r, V::set1(1.0f));
  const auto half = V::round_to_int(V::mul(n, V::set1(0.5f)));  // two factors: 2^n alone may leave the range
  const auto rest = V::round_to_int(V::sub(n, V::to_float(half)));
  return V::mul(V::mul(p, V::power_of_two(half)), V::power_of_two(rest));
}

// e^x for -88.02 <= x <= 0 within 3e-7 of it, at half the cost of `exp`: 0 below -87.7, where it would be subnormal.
template <class V>
typename V::F exp_in_range(typename V::F x) {
  using F = typename V::F;
  const auto whole = V::round_to_int(V::mul(x, V::set1(1.44269504f)));
  const F n = V::to_float(whole);
  F r = V::fma(n, V::set1(-0.693145752f), x);
  r = V::fma(n, V::set1(-1.42860677e-6f), r);
  F p = V::set1(1.0f / 720);
  p = V::fma(p, r, V::set1(1.0f / 120));
  p = V::fma(p, r, V::set1(1.0f / 24));
  p = V::fma(p, r, V::set1(1.0f / 6));
  p = V::fma(p, r, V::set1(0.5f));
  p = V::fma(p, r, V::set1(1.0f));
  p = V::fma(p, r, V::set1(1.0f));
  return V::mul(p, V::power_of_two(whole));
}

// The same for x <= 0; at the bound the power of two is 0. NaN gives 0 in the first and NaN in the second.
template <class V>
typename V::F exp_below(typename V::F x) {
  return exp_in_range<V>(V::max(x, V::set1(-88.02f)));
}

template <class V>
typename V::F exp_below_or_nan(typename V::F x) {
  return exp_in_range<V>(V::max(V::set1(-88.02f), x));
}

// 2^x for x <= 0 within 2e-7 of it, cheaper again: 0 below -126.5. NaN gives NaN.
template <class V>
typename V::F exp2_below_or_nan(typename V::F x) {
  using F = typename V::F;
  x = V::max(V::set1(-127.0f), x);
  const auto whole = V::round_to_int(x);
  const F r = V::sub(x, V::to_float(whole));
  F p = V::set1(0.00132647203f);  // of degree 5, fitted within 1e-7, 1 at 0
  p = V::fma(p, r, V::set1(0.00967151299f));
  p = V::fma(p, r, V::set1(0.0555073395f));
  p = V::fma(p, r, V::set1(0.240222424f));
  p = V::fma(p, r, V::set1(0.693147004f));
  p = V::fma(p, r, V::set1(1.0f));
  return V::mul(p, V::power_of_two(whole));
}

// x / (1 + e^(-y)): the sigmoid of y, times x
template <class V>
typename V::F times_sigmoid(typename V::F x, typename V::F y) {
  return V::div(x, V::add(V::set1(1.0f), exp<V>(V::sub(V::zero(), y))));
}

template <class V>
typename V::F silu(typename V::F x) {
  return times_sigmoid<V>(x, x);
}

// x Phi(x). For a = |x|: Phi(-a) = e^(-a^2/2) t P(t), t = 1 / (1 + 0.26 a), P of degree 8 fitted within 2e-7.
template <class V>
typename V::F gelu(typename V::F x) {
  using F = typename V::F;
  const F a = V::min(V::set1(20.0f), V::max(V::sub(V::zero(), x), x));  // Phi(-20) is 0 in float32; NaN stays
  const F t = V::div(V::set1(1.0f), V::fma(V::set1(0.26f), a, V::set1(1.0f)));
  F p = V::set1(0.0302303191f);
  p = V::fma(p, t, V::set1(-0.151494518f));
  p = V::fma(p, t, V::set1(0.248733357f));
  p = V::fma(p, t, V::set1(-0.147789508f));
  p = V::fma(p, t, V::set1(0.158758864f));
  p = V::fma(p, t, V::set1(0.0519647785f));
  p = V::fma(p, t, V::set1(0.102788694f));
  p = V::fma(p, t, V::set1(0.10305097f));
  p = V::fma(p, t, V::set1(0.103757024f));
  const F q = V::mul(V::mul(p, t), exp<V>(V::mul(V::mul(a, a), V::set1(-0.5f))));
  return V::mul(x, V::where_positive(x, V::sub(V::set1(1.0f), q), q));
}

// x (1 + tanh(u)) / 2 = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V>
typename V::F gelu_tanh(typename V::F x) {
  using F = typename V::F;
  const F cubic = V::fma(V::mul(V::mul(x, x), x), V::set1(0.044715f), x);
  return times_sigmoid<V>(x, V::mul(cubic, V::set1(1.59576912f)));
}

template <class V>
typename V::F relu(typename V::F x) {
  return V::max(V::zero(), x);  // NaN stays: see exp
}

}  // namespace
}  // namespace planmill
