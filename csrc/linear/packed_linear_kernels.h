// The kernels behind PackedLinearKernels, written once over a vector type of common/vec.h.
//
// Columns first: two vectors of them meet all rows of a block, so that they come from the first-level cache, and the rows,
// read where they lie, from the second. A tile is finished at once; its sums run over a few hundred channels and are added
// up then, which keeps their error as small as that of a product in blocks. The activation follows while the tile is in the
// first-level cache. Every output is summed in the same order, whatever the block and the tile.
#pragma once

#include "common/products.h"
#include "common/vec.h"
#include "common/vec_math.h"
#include "linear/packed_linear.h"

namespace planmill {
namespace {

constexpr int64_t kDepth = 256;  // channels of a sum, at most

// The channels of every sum: as many in each, but for the last.
inline int64_t depth_of(const PackedLinear& linear) {
  const int64_t sums = (linear.channels + kDepth - 1) / kDepth;
  return sums == 0 ? 1 : (linear.channels + sums - 1) / sums;
}

template <class V>
inline typename V::F load_columns(const float* p, int64_t count) {
  if (count >= V::kWidth) return V::load(p);
  float x[V::kWidth] = {};
  for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  return V::load(x);
}

template <class V>
inline void store_columns(float* p, int64_t count, typename V::F value) {
  if (count >= V::kWidth) return V::store(p, value);
  float x[V::kWidth];
  V::store(x, value);
  for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}

// Weights that come next, asked for a few lines at a time while there is other work.
struct WeightsAhead {
  const float* data;
  int64_t lines;  // to ask for during a tile

  void ask(int64_t count) {
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(data + i * kLinearPanel, 0, 2);  // into the second-level cache
    data += count * kLinearPanel;
  }
};

template <class V, int Rows, int Vectors>
void linear_tile(const PackedLinear& linear, int64_t row, int64_t column, WeightsAhead ahead) {
  constexpr int W = V::kWidth;
  const int64_t depth = depth_of(linear), count = linear.outputs - column;
  float totals[Rows][Vectors * W];
  typename V::F sums[Rows][Vectors];
  const float *right[Vectors], *left = linear.x + row * linear.channels;
#pragma GCC unroll 8
  for (int j = 0; j < Vectors; ++j) {
    const int64_t at = column + j * W;
    right[j] = linear.packed + at / kLinearPanel * linear.channels * kLinearPanel + at % kLinearPanel;
    const auto bias = load_columns<V>(linear.bias + at, count - j * W);
    for (int i = 0; i < Rows; ++i) V::store(totals[i] + j * W, bias);
  }
  float* out = linear.out + row * linear.outputs + column;
  for (int i = 0; i < Rows; ++i) __builtin_prefetch(out + i * linear.outputs, 1, 3);  // to be written, pages apart
  for (int64_t first = 0; first < linear.channels; first += depth) {
    const int64_t last = linear.channels - first < depth ? linear.channels : first + depth;
    ahead.ask(ahead.lines * (last - first) / linear.channels);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) sums[i][j] = V::zero();
#pragma GCC unroll 4
    for (int64_t p = first; p < last; ++p, ++left) {
      typename V::F weights[Vectors];
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) weights[j] = V::load(right[j] + p * kLinearPanel);
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {
        const auto x = V::set1(left[i * linear.channels]);
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) sums[i][j] = V::fma(x, weights[j], sums[i][j]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j)
        V::store(totals[i] + j * W, V::add(V::load(totals[i] + j * W), sums[i][j]));
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j)
      store_columns<V>(out + i * linear.outputs + j * W, count - j * W, V::load(totals[i] + j * W));
}

// A tile of `rows` rows, at most Rows.
template <class V, int Rows, int Vectors>
void linear_rows(const PackedLinear& linear, int64_t rows, int64_t row, int64_t column, WeightsAhead ahead) {
  if constexpr (Rows > 1)
    if (rows < Rows) return linear_rows<V, Rows - 1, Vectors>(linear, rows, row, column, ahead);
  linear_tile<V, Rows, Vectors>(linear, row, column, ahead);
}

template <class V, typename V::F (*Activate)(typename V::F)>
void activate_columns(const PackedLinear& linear, int64_t first_row, int64_t last_row, int64_t column, int64_t columns) {
  const int64_t left = linear.outputs - column, count = left < columns ? left : columns;
  for (int64_t row = first_row; row < last_row; ++row) {
    float* out = linear.out + row * linear.outputs + column;
    for (int64_t c = 0; c < count; c += V::kWidth)
      store_columns<V>(out + c, count - c, Activate(load_columns<V>(out + c, count - c)));
  }
}

template <class V>
void activate(const PackedLinear& linear, int64_t first_row, int64_t last_row, int64_t column, int64_t columns) {
  switch (linear.activation) {
    case LinearActivation::kNone:
      return;
    case LinearActivation::kGelu:
      return activate_columns<V, gelu<V>>(linear, first_row, last_row, column, columns);
    case LinearActivation::kGeluTanh:
      return activate_columns<V, gelu_tanh<V>>(linear, first_row, last_row, column, columns);
    case LinearActivation::kRelu:
      return activate_columns<V, relu<V>>(linear, first_row, last_row, column, columns);
    case LinearActivation::kSilu:
      return activate_columns<V, silu<V>>(linear, first_row, last_row, column, columns);
  }
}

// Rows of the next tile: what does not fill a whole one is shared by the last two, since a tile of one or two rows would
// wait for its own sums.
template <class V>
inline int64_t next_rows(int64_t left) {
  constexpr int64_t kRows = kProductRows<V>;
  if (left <= kRows || left >= 2 * kRows) return left < kRows ? left : kRows;
  return (left + 1) / 2;
}

// All columns from `column` to `last`, Vectors at a time and the rest half as many, for one tile of Rows rows.
template <class V, int Rows, int Vectors>
void linear_row(const PackedLinear& linear, int64_t row, int64_t column, int64_t last) {
  for (; column + Vectors * V::kWidth <= last; column += Vectors * V::kWidth) {
    linear_tile<V, Rows, Vectors>(linear, row, column, {linear.packed, 0});
    activate<V>(linear, row, row + Rows, column, Vectors * V::kWidth);
  }
  if constexpr (Vectors > 1) linear_row<V, Rows, Vectors / 2>(linear, row, column, last);
}

template <class V, int Vectors>
void linear_columns(const PackedLinear& linear, int64_t first_row, int64_t last_row, int64_t column, int64_t last) {
  const int64_t next = column + Vectors * V::kWidth, panels = (Vectors * V::kWidth + kLinearPanel - 1) / kLinearPanel;
  const int64_t tiles = (last_row - first_row) / kProductRows<V> + 1;
  const int64_t lines = next < last ? (panels * linear.channels + tiles - 1) / tiles : 0;
  WeightsAhead ahead{linear.packed + (next < last ? next / kLinearPanel * linear.channels * kLinearPanel : 0), lines};
  for (int64_t row = first_row; row < last_row; ahead.data += lines * kLinearPanel) {
    const int64_t rows = next_rows<V>(last_row - row);
    linear_rows<V, kProductRows<V>, Vectors>(linear, rows, row, column, ahead);
    activate<V>(linear, row, row + rows, column, Vectors * V::kWidth);
    row += rows;
  }
}

template <class V>
void run_packed_linear(const PackedLinear& linear, int64_t first_row, int64_t last_row, int64_t first_panel,
                       int64_t last_panel) {
  int64_t column = first_panel * kLinearPanel;
  const int64_t last = last_panel * kLinearPanel;
  // One or two rows: eight sums are on the way at a time all the same.
  if (last_row - first_row == 1) return linear_row<V, 1, 8>(linear, first_row, column, last);
  if (last_row - first_row == 2) return linear_row<V, 2, 4>(linear, first_row, column, last);
  for (; column + 2 * V::kWidth <= last; column += 2 * V::kWidth)
    linear_columns<V, 2>(linear, first_row, last_row, column, last);
  if (column < last) linear_columns<V, 1>(linear, first_row, last_row, column, last);
}

template <class V>
constexpr PackedLinearKernels packed_linear_kernels() {
  return {kProductRows<V>, &run_packed_linear<V>};
}

}  // namespace
}  // namespace planmill
