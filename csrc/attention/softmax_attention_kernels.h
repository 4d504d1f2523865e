// The kernels behind SoftmaxAttentionKernels, written once over a vector type of common/vec.h.
//
// Keys and values of a block are packed into panels of two vectors, down which the register tiles of both products walk;
// the scores of a slab, two tiles high, stay in the first-level cache from the first product over the softmax to the
// second. Several blocks meet in running maxima and sums. Every row is computed in the same order, whatever tile, slab
// and task it falls into.
#pragma once

#include "attention/softmax_attention.h"
#include "common/products.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace planmill {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;

template <class V>
constexpr int64_t kPanel = 2 * V::kWidth;

template <class V>
inline int64_t whole_vectors(int64_t n) {
  return (n + V::kWidth - 1) / V::kWidth * V::kWidth;
}

// to [panels, channels, panel] = `scale` times keys [first, first + count), zeros behind them.
template <class V>
void pack_keys(const AttentionRows& k, int64_t first, int64_t count, int64_t channels, float scale, float* to) {
  constexpr int64_t P = kPanel<V>;
  for (int64_t begin = 0; begin < count; begin += P, to += channels * P) {
    const float* from = k.data + (first + begin) * k.row;
    const int64_t lanes = count - begin < P ? count - begin : P;
    if (k.row == 1 && lanes == P) {  // channels first, as pictures have them
      const auto factor = V::set1(scale);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t lane = 0; lane < P; lane += V::kWidth)
          V::store(to + c * P + lane, V::mul(factor, V::load(from + c * k.channel + lane)));
      continue;
    }
    for (int64_t lane = 0; lane < lanes; ++lane, from += k.row)
      if (k.channel == 1)
        for (int64_t c = 0; c < channels; ++c) to[c * P + lane] = scale * from[c];
      else
        for (int64_t c = 0; c < channels; ++c) to[c * P + lane] = scale * from[c * k.channel];
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t lane = lanes; lane < P; ++lane) to[c * P + lane] = 0.0f;
  }
}

// to [panels, count, panel] = the values of keys [first, first + count), zeros behind their channels.
template <class V>
void pack_values(const AttentionRows& v, int64_t first, int64_t count, int64_t channels, float* to) {
  constexpr int64_t P = kPanel<V>;
  for (int64_t begin = 0; begin < channels; begin += P) {
    const float* from = v.data + first * v.row + begin * v.channel;
    const int64_t lanes = channels - begin < P ? channels - begin : P;
    for (int64_t key = 0; key < count; ++key, from += v.row, to += P) {
      if (lanes == P && v.channel == 1) {
        V::store(to, V::load(from));
        V::store(to + V::kWidth, V::load(from + V::kWidth));
        continue;
      }
      for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = from[lane * v.channel];
      for (int64_t lane = lanes; lane < P; ++lane) to[lane] = 0.0f;
    }
  }
}

// A register tile of c = a b, or c += a b where `add`: Rows rows of a, Vectors vectors of a panel [k, 2 vectors].
template <class V, int Rows, int Vectors>
void panel_tile(const float* a, int64_t lda, const float* panel, float* c, int64_t ldc, int64_t k, bool add) {
  typename V::F sums[Rows][Vectors];
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sums[i][j] = add ? V::load(c + i * ldc + j * V::kWidth) : V::zero();
#pragma GCC unroll 4
  for (int64_t p = 0; p < k; ++p) {
    typename V::F right[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) right[j] = V::load(panel + p * kPanel<V> + j * V::kWidth);
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i) {
      const auto x = V::set1(a[i * lda + p]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sums[i][j] = V::fma(x, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) V::store(c + i * ldc + j * V::kWidth, sums[i][j]);
}

// A tile of `rows` rows, at most Rows.
template <class V, int Rows, int Vectors>
void panel_rows(int64_t rows, const float* a, int64_t lda, const float* panel, float* c, int64_t ldc, int64_t k, bool add) {
  if constexpr (Rows > 1)
    if (rows < Rows) return panel_rows<V, Rows - 1, Vectors>(rows, a, lda, panel, c, ldc, k, add);
  panel_tile<V, Rows, Vectors>(a, lda, panel, c, ldc, k, add);
}

// c [m, n] = a [m, k] times panels of [k, 2 vectors], or c += that; m rows of a slab, n in whole vectors. One vector alone
// meets all rows at once, two meet half of them.
template <class V>
void multiply_panels(const float* a, int64_t lda, const float* panels, float* c, int64_t ldc, int64_t m, int64_t k, int64_t n,
                     bool add) {
  constexpr int64_t P = kPanel<V>;
  constexpr int kRows = kProductRows<V>;
  const int64_t half = m > kRows ? (m + 1) / 2 : m;
  for (; n >= P; n -= P, panels += k * P, c += P) {
    panel_rows<V, kRows, 2>(half, a, lda, panels, c, ldc, k, add);
    if (half < m) panel_rows<V, kRows, 2>(m - half, a + half * lda, lda, panels, c + half * ldc, ldc, k, add);
  }
  if (n > 0) panel_rows<V, 2 * kRows, 1>(m, a, lda, panels, c, ldc, k, add);
}

template <class V>
struct AttentionTask {
  using F = typename V::F;
  static constexpr int64_t kSlab = 2 * kProductRows<V>;
  const AttentionShape& shape;
  const AttentionHead& head;
  int64_t keys, padded;  // of the block
  float *packed_keys, *packed_values, *scores, *queries, *sums, *maxima, *totals;

  AttentionTask(const AttentionShape& s, const AttentionHead& h, float* scratch) : shape(s), head(h) {
    packed_keys = scratch;
    packed_values = packed_keys + s.block * s.d;
    scores = packed_values + s.block * s.dv_padded;
    queries = scores + s.block * kSlab;
    sums = queries + s.d * kSlab;
    maxima = sums + s.queries * s.dv_padded;
    totals = maxima + s.queries;
  }

  void pack(int64_t first, bool there) {
    keys = shape.keys - first < shape.block ? shape.keys - first : shape.block;
    padded = whole_vectors<V>(keys);
    if (there) return;
    pack_keys<V>(head.k, first, keys, shape.d, shape.scale * kLog2E, packed_keys);
    pack_values<V>(head.v, first, keys, shape.dv, packed_values);
  }

  // The running maximum of a row; where it rises, what was summed before is scaled.
  void raise(float* row, float* sum, float& maximum, float& total, bool first) {
    for (int64_t j = keys; j < padded; ++j) row[j] = -kInfinity;
    F top = V::set1(-kInfinity);
    for (int64_t j = 0; j < padded; j += V::kWidth) top = V::max(V::load(row + j), top);  // gives top for NaN
    const float highest = V::max_lane(top);
    if (first) {
      maximum = highest, total = 0.0f;
    } else if (highest > maximum) {
      const F factor = exp2_below_or_nan<V>(V::set1(maximum - highest));
      for (int64_t c = 0; c < shape.dv_padded; c += V::kWidth) V::store(sum + c, V::mul(V::load(sum + c), factor));
      float factors[V::kWidth];
      V::store(factors, factor);
      maximum = highest, total *= factors[0];
    }
  }

  // Scores become 2^(score - maximum).
  void weigh(float* row, float maximum, float& total) {
    const F base = V::set1(maximum == -kInfinity ? 0.0f : maximum);
    F added = V::zero();
    for (int64_t j = 0; j < padded; j += V::kWidth) {
      const F weight = exp2_below_or_nan<V>(V::sub(V::load(row + j), base));
      V::store(row + j, weight);
      added = V::add(added, weight);
    }
    total += V::sum(added);
  }

  void finish(const float* sum, float total, float* y) {
    const F share = V::set1(1.0f / total);  // all scores -inf: 0 / 0 follows
    int64_t c = 0;
    for (; c + V::kWidth <= shape.dv; c += V::kWidth) V::store(y + c, V::mul(V::load(sum + c), share));
    for (; c < shape.dv; ++c) y[c] = sum[c] * (1.0f / total);
  }

  // Queries [row, row + rows) of the head, the first of which is number `at` of the task.
  void attend(int64_t row, int64_t rows, int64_t at, bool first, bool last) {
    const AttentionRows& q = head.q;
    float* sum = sums + at * shape.dv_padded;
    const float* left = q.data + row * q.row;
    if (q.channel != 1) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < shape.d; ++c) queries[i * shape.d + c] = left[i * q.row + c * q.channel];
      left = queries;
    }
    multiply_panels<V>(left, q.channel == 1 ? q.row : shape.d, packed_keys, scores, padded, rows, shape.d, padded, false);
    for (int64_t i = 0; i < rows; ++i)
      raise(scores + i * padded, sum + i * shape.dv_padded, maxima[at + i], totals[at + i], first);
    for (int64_t i = 0; i < rows; ++i) weigh(scores + i * padded, maxima[at + i], totals[at + i]);
    multiply_panels<V>(scores, padded, packed_values, sum, shape.dv_padded, rows, keys,
                       whole_vectors<V>(shape.dv), !first);
    for (int64_t i = 0; last && i < rows; ++i)
      finish(sum + i * shape.dv_padded, totals[at + i], head.y + (row + i) * head.row);
  }
};

template <class V>
void attend_queries(const AttentionShape& shape, const AttentionHead& head, int64_t first, int64_t last, bool packed,
                    float* scratch) {
  AttentionTask<V> task(shape, head, scratch);
  constexpr int64_t kSlab = AttentionTask<V>::kSlab;
  for (int64_t begin = 0; begin < shape.keys; begin += shape.block) {
    task.pack(begin, packed);
    for (int64_t row = first; row < last; row += kSlab)
      task.attend(row, last - row < kSlab ? last - row : kSlab, row - first, begin == 0, begin + shape.block >= shape.keys);
  }
}

template <class V>
constexpr SoftmaxAttentionKernels softmax_attention_kernels() {
  return {V::kWidth, AttentionTask<V>::kSlab, &attend_queries<V>};
}

}  // namespace
}  // namespace planmill
