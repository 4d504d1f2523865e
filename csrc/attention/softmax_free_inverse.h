// The small inverse of softmax_free_attention: Newton's steps or Cholesky, on a symmetric P [m, ld], zero behind m.
#pragma once

#include "attention/softmax_free_attention.h"
#include "common/products.h"
#include "common/vec.h"

namespace planmill {
namespace {

constexpr float kConverged = 1.0e-8f;  // |I - P V|^2 squares in a step: what is left of it then is beyond float32

// c = a b of [m, m] matrices whose rows lie ld apart, in blocks of b that stay in the second-level cache.
template <class V>
void multiply_square(const float* a, const float* b, float* c, int64_t m, int64_t ld) {
  constexpr int64_t kDepth = 256, kColumns = 128;
  for (int64_t j = 0; j < ld; j += kColumns) {
    const int64_t columns = ld - j < kColumns ? ld - j : kColumns;
    for (int64_t k = 0; k < m; k += kDepth) {
      const int64_t depth = m - k < kDepth ? m - k : kDepth;
      multiply<V>({a + k, ld, 1}, b + k * ld + j, ld, c + j, ld, m, depth, columns, k > 0);
    }
  }
}

// sum of |I + x|^2
template <class V>
float distance_from_minus_one(const float* x, int64_t m, int64_t ld) {
  float total = 0.0f;
  for (int64_t i = 0; i < m; ++i, x += ld) {
    auto sum = V::zero();
    for (int64_t j = 0; j < ld; j += V::kWidth) {
      const auto value = V::load(x + j);
      sum = V::fma(value, value, sum);
    }
    total += V::sum(sum) - x[i] * x[i] + (1.0f + x[i]) * (1.0f + x[i]);
  }
  return total;
}

// w = V_t w. Held is N = -V, so that a step is N <- 2 N + N (P N): two products and a copy. Both are taken whole: P V is
// symmetric only as far as P and V commute, and to mirror half of it would feed rounding back, times the condition of P.
template <class V>
void newton(const SoftInverse& inverse, const float* p, float alpha, float* w, float* scratch) {
  const int64_t m = inverse.m, ld = inverse.ld, size = m * ld;
  float *n = scratch, *x = n + size, *next = x + size, *out = next + size;
  for (int64_t i = 0; i < size; ++i) n[i] = -alpha * p[i];
  for (int64_t t = 0; t < inverse.iterations; ++t) {
    multiply_square<V>(p, n, x, m, ld);
    const bool last = distance_from_minus_one<V>(x, m, ld) < kConverged;
    multiply_square<V>(n, x, next, m, ld);
    // 2 N last: entries of a badly conditioned N are large, and to begin sums with them would round every term to theirs.
    for (int64_t i = 0; i < size; i += V::kWidth)
      V::store(next + i, V::fma(V::set1(2.0f), V::load(n + i), V::load(next + i)));
    float* old = n;
    n = next, next = old;
    if (last) break;
  }
  multiply<V>({n, ld, 1}, w, inverse.ldv, out, inverse.ldv, m, m, inverse.ldv, false);
  for (int64_t i = 0; i < m * inverse.ldv; ++i) w[i] = -out[i];
}

template <class V>
void subtract(float* y, const float* x, float factor, int64_t n) {
  const auto f = V::set1(-factor);
  for (int64_t i = 0; i < n; i += V::kWidth) V::store(y + i, V::fma(f, V::load(x + i), V::load(y + i)));
}

template <class V>
void scale_by(float* y, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += V::kWidth) V::store(y + i, V::mul(V::set1(factor), V::load(y + i)));
}

// P = U^T U: U above the diagonal of p, and the inverses of its diagonal there, NaN where P is not positive.
template <class V>
void factorise(float* p, int64_t m, int64_t ld, float* block) {
  for (int64_t first = 0; first < m; first += kSoftBlock) {
    const int64_t rows = m - first < kSoftBlock ? m - first : kSoftBlock, columns = ld - first;
    multiply<V>({p + first, 1, ld}, p + first, ld, block, columns, rows, first, columns, false);
    for (int64_t r = first; r < first + rows; ++r) {
      float* row = p + r * ld;
      subtract<V>(row + first, block + (r - first) * columns, 1.0f, columns);
      for (int64_t s = first; s < r; ++s) subtract<V>(row + first, p + s * ld + first, p[s * ld + r], columns);
      const float inverse = row[r] > 0.0f ? 1.0f / __builtin_sqrtf(row[r]) : __builtin_nanf("");
      scale_by<V>(row + first, inverse, columns);
      row[r] = inverse;
    }
  }
}

// w = P^-1 w, of P's factor.
template <class V>
void solve(const float* p, int64_t m, int64_t ld, float* w, int64_t ldv, float* block) {
  for (int64_t first = 0; first < m; first += kSoftBlock) {  // U^T z = w
    const int64_t rows = m - first < kSoftBlock ? m - first : kSoftBlock;
    multiply<V>({p + first, 1, ld}, w, ldv, block, ldv, rows, first, ldv, false);
    for (int64_t r = first; r < first + rows; ++r) {
      float* row = w + r * ldv;
      subtract<V>(row, block + (r - first) * ldv, 1.0f, ldv);
      for (int64_t s = first; s < r; ++s) subtract<V>(row, w + s * ldv, p[s * ld + r], ldv);
      scale_by<V>(row, p[r * ld + r], ldv);
    }
  }
  for (int64_t first = (m - 1) / kSoftBlock * kSoftBlock; first >= 0; first -= kSoftBlock) {  // U x = z
    const int64_t end = m - first < kSoftBlock ? m : first + kSoftBlock;
    multiply<V>({p + first * ld + end, ld, 1}, w + end * ldv, ldv, block, ldv, end - first, m - end, ldv, false);
    for (int64_t r = end - 1; r >= first; --r) {
      float* row = w + r * ldv;
      subtract<V>(row, block + (r - first) * ldv, 1.0f, ldv);
      for (int64_t s = r + 1; s < end; ++s) subtract<V>(row, w + s * ldv, p[r * ld + s], ldv);
      scale_by<V>(row, p[r * ld + r], ldv);
    }
  }
}

template <class V>
void step_norms(const SoftInverse& inverse, const float* p, float alpha, float* norms, float* scratch) {
  const int64_t m = inverse.m, ld = inverse.ld;
  multiply_square<V>(p, p, scratch, m, ld);
  for (int64_t k = 0; k <= kSoftHalvings; ++k, alpha *= 0.5f) {
    norms[k] = 0.0f;
    for (int64_t i = 0; i < m; ++i) {
      const float* row = scratch + i * ld;
      auto sum = V::zero();
      for (int64_t j = 0; j < ld; j += V::kWidth) {
        const auto value = V::mul(V::set1(alpha), V::load(row + j));
        sum = V::add(sum, V::max(value, V::sub(V::zero(), value)));
      }
      const float own = alpha * row[i], off = own > 1.0f ? own - 1.0f : 1.0f - own;
      const float total = V::sum(sum) - (own > 0.0f ? own : -own) + off;
      if (!(total <= norms[k])) norms[k] = total;
    }
  }
}

template <class V>
void invert(const SoftInverse& inverse, float* p, const float* sums, float alpha, float* w, float* scratch) {
  const int64_t m = inverse.m, ldv = inverse.ldv;
  const auto scale_rows = [&] {
    for (int64_t i = 0; i < m && inverse.normalize; ++i) scale_by<V>(w + i * ldv, 1.0f / __builtin_sqrtf(sums[i]), ldv);
  };
  scale_rows();
  if (inverse.iterations >= 0) {
    newton<V>(inverse, p, alpha, w, scratch);
  } else {
    factorise<V>(p, m, inverse.ld, scratch);
    solve<V>(p, m, inverse.ld, w, ldv, scratch);
  }
  scale_rows();
}

}  // namespace
}  // namespace planmill
