// The kernels behind SoftKernels, written once over a vector type of common/vec.h.
#pragma once

#include "attention/softmax_free_attention.h"
#include "attention/softmax_free_inverse.h"
#include "common/element_rows.h"
#include "common/products.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace planmill {
namespace {

constexpr float kFar = 1.0e30f;  // a square from which a query is nowhere near any landmark, infinite ones included

inline void prepare_landmarks(float* landmarks, int64_t m, int64_t d, int64_t ld, float* centre, float* transposed,
                              float* half_norms) {
  for (int64_t c = 0; c < d; ++c) centre[c] = 0.0f;
  const float share = 1.0f / static_cast<float>(m);
  for (int64_t j = 0; j < m; ++j)
    for (int64_t c = 0; c < d; ++c) centre[c] += share * landmarks[j * d + c];
  for (int64_t j = 0; j < ld; ++j) {
    float squares = 0.0f;
    for (int64_t c = 0; c < d && j < m; ++c) {
      float& x = landmarks[j * d + c];
      x -= centre[c];
      squares += x * x;
    }
    half_norms[j] = 0.5f * squares;
  }
  transpose(landmarks, d, m, d, transposed, ld, ld);
}

// x [rows, n_padded] = the rows of a matrix in float32, zero behind n.
template <class V, class T>
void load_rows(const void* source, int64_t row, int64_t first, int64_t rows, int64_t n, float* x, int64_t ldx) {
  const auto* from = static_cast<const typename T::Stored*>(source) + first * row;
  for (int64_t r = 0; r < rows; ++r, from += row, x += ldx) {
    int64_t c = 0;
    for (; c + V::kWidth <= n; c += V::kWidth) V::store(x + c, load_row<V, T>(from + c));
    for (; c < n; ++c) x[c] = T::read(from[c]);
    for (; c < ldx; ++c) x[c] = 0.0f;
  }
}

template <class V, class T>
void store_rows(const float* y, int64_t ldy, int64_t rows, int64_t n, void* target) {
  auto* to = static_cast<typename T::Stored*>(target);
  for (int64_t r = 0; r < rows; ++r, to += n, y += ldy) {
    int64_t c = 0;
    for (; c + V::kWidth <= n; c += V::kWidth) store_row<V, T>(to + c, V::load(y + c));
    for (; c < n; ++c) to[c] = T::round(y[c]);
  }
}

template <class V>
void load_any(Element type, const void* source, int64_t row, int64_t first, int64_t rows, int64_t n, float* x, int64_t ldx) {
  if (type == Element::kFloat) load_rows<V, Float32>(source, row, first, rows, n, x, ldx);
  else if (type == Element::kBFloat16) load_rows<V, BFloat16>(source, row, first, rows, n, x, ldx);
  else load_rows<V, Half>(source, row, first, rows, n, x, ldx);
}

// c [rows, ld] = e^(-|x_i - L_j|^2 / 2) from x [rows, d] around the centre and half the squares of its rows.
template <class V>
void gaussian(const SoftHead& head, const float* x, const float* half_squares, int64_t rows, float* c) {
  const int64_t ld = head.ld;
  multiply<V>({x, head.d, 1}, head.transposed, ld, c, ld, rows, head.d, ld, false);
  for (int64_t r = 0; r < rows; ++r, c += ld) {
    const auto own = V::set1(half_squares[r]);
    for (int64_t j = 0; j < ld; j += V::kWidth) {
      // Rounding can leave a square below zero. Zero comes first: min gives its second operand for NaN.
      const auto exponent = V::sub(V::load(c + j), V::add(own, V::load(head.half_norms + j)));
      V::store(c + j, exp_below_or_nan<V>(V::min(V::zero(), exponent)));
    }
  }
}

// Cm of the queries [first, first + rows) in c.
template <class V>
void query_kernel(const SoftHead& head, int64_t first, int64_t rows, float* x, float* half_squares, float* c) {
  const int64_t d = head.d;
  load_any<V>(head.type, head.q, head.q_row, first, rows, d, x, d);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x + r * d;
    auto sums = V::zero();
    int64_t i = 0;
    for (; i + V::kWidth <= d; i += V::kWidth) {
      const auto value = V::sub(V::mul(V::set1(head.scale), V::load(row + i)), V::load(head.centre + i));
      V::store(row + i, value);
      sums = V::fma(value, value, sums);
    }
    float squares = V::sum(sums);
    for (; i < d; ++i) {
      row[i] = head.scale * row[i] - head.centre[i];
      squares += row[i] * row[i];
    }
    if (squares > kFar) {
      for (i = 0; i < d; ++i) row[i] = 0.0f;
      squares = kFar;
    }
    half_squares[r] = 0.5f * squares;
  }
  gaussian<V>(head, x, half_squares, rows, c);
}

struct SoftScratch {
  float *x, *half_squares, *c, *wide;
  SoftScratch(const SoftHead& head, float* scratch)
      : x(scratch), half_squares(x + kSoftTile * head.d), c(half_squares + kSoftTile), wide(c + kSoftTile * head.ld) {}
};

template <class V>
void gather(const SoftHead& head, int64_t first, int64_t last, float* w, float* scratch) {
  const SoftScratch s(head, scratch);
  for (int64_t n = first; n < last; n += kSoftTile) {
    const int64_t rows = last - n < kSoftTile ? last - n : kSoftTile;
    query_kernel<V>(head, n, rows, s.x, s.half_squares, s.c);
    load_any<V>(head.type, head.v, head.v_row, n, rows, head.dv, s.wide, head.ldv);
    multiply<V>({s.c, 1, head.ld}, s.wide, head.ldv, w, head.ldv, head.m, rows, head.ldv, n > first);
  }
}

template <class V>
void scatter(const SoftHead& head, int64_t first, int64_t last, const float* u, void* out, float* scratch) {
  const SoftScratch s(head, scratch);
  for (int64_t n = first; n < last; n += kSoftTile) {
    const int64_t rows = last - n < kSoftTile ? last - n : kSoftTile, at = (n - first) * head.dv;
    query_kernel<V>(head, n, rows, s.x, s.half_squares, s.c);
    multiply<V>({s.c, head.ld, 1}, u, head.ldv, s.wide, head.ldv, rows, head.m, head.ldv, false);
    if (head.type == Element::kFloat) store_rows<V, Float32>(s.wide, head.ldv, rows, head.dv, static_cast<float*>(out) + at);
    else if (head.type == Element::kBFloat16)
      store_rows<V, BFloat16>(s.wide, head.ldv, rows, head.dv, static_cast<uint16_t*>(out) + at);
    else store_rows<V, Half>(s.wide, head.ldv, rows, head.dv, static_cast<_Float16*>(out) + at);
  }
}

template <class V>
float gram(const SoftHead& head, float ridge, float* p, float* sums) {
  gaussian<V>(head, head.landmarks, head.half_norms, head.m, p);
  float largest = 0.0f;
  for (int64_t i = 0; i < head.m; ++i) {
    float* row = p + i * head.ld;
    row[i] = __builtin_isnan(row[i]) ? row[i] : 1.0f;  // at no distance
    for (int64_t j = head.m; j < head.ld; ++j) row[j] = 0.0f;
    auto sum = V::zero();
    for (int64_t j = 0; j < head.ld; j += V::kWidth) sum = V::add(sum, V::load(row + j));
    sums[i] = V::sum(sum);
    if (!(sums[i] <= largest) && !__builtin_isnan(largest)) largest = sums[i];
    row[i] += ridge;
  }
  return largest;
}

template <class V>
constexpr SoftKernels soft_kernels() {
  return {V::kWidth, &prepare_landmarks, &gather<V>, &gram<V>, &step_norms<V>, &invert<V>, &scatter<V>};
}

}  // namespace
}  // namespace planmill
