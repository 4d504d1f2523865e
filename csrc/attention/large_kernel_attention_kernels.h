// The kernels behind LargeKernelKernels, written once over a vector type of common/vec.h.
//
// A depthwise convolution holds a register tile of 4 output rows, a dilation apart, and up to 3 vectors of columns: these
// rows read the same input rows, so that three loads and at most four broadcast weights serve twelve products. Columns beside
// the plane are zeros in the buffers; rows above and below are left out.
#pragma once

#include "attention/large_kernel_attention.h"
#include "common/element_rows.h"
#include "common/products.h"
#include "common/vec.h"

namespace planmill {
namespace {

constexpr int64_t kPixels = 64;    // of a block of the product: 16 KB of 64 channels
constexpr int64_t kChannels = 48;  // results of a step of the product

template <class V>
int64_t row_of(int64_t width, int64_t border) {
  return (width + V::kWidth - 1) / V::kWidth * V::kWidth + 2 * border;
}

template <class V>
void store_columns(float* p, int64_t count, typename V::F value) {
  if (count >= V::kWidth) return V::store(p, value);
  float x[V::kWidth];
  V::store(x, value);
  for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}

// One depthwise convolution, K x K taps, Dilation apart. Input rows lie `ldx` apart and begin K / 2 * Dilation zeros before
// `x`; output rows lie `ldy` apart.
template <class V, int K, int Dilation>
struct Depthwise {
  static constexpr int kReach = K / 2;
  const float* x;
  int64_t ldx;
  const float* weight;
  float bias;
  float* y;
  int64_t ldy, height, width;

  // Rows row, row + Dilation, ... (Rows of them, those of them that there are), columns from `column`.
  template <int Rows, int Vectors>
  void tile(int64_t row, int64_t column) const {
    typename V::F sums[Rows][Vectors];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sums[r][v] = V::set1(bias);
    int first = 0, last = K;  // taps that reach the plane
    while (column + (first - kReach) * Dilation + Vectors * V::kWidth <= 0) ++first;
    while (column + (last - 1 - kReach) * Dilation >= width) --last;
#pragma GCC unroll 10
    for (int j = 0; j < K + Rows - 1; ++j) {
      const int64_t from = row + (j - kReach) * Dilation;
      if (from < 0 || from >= height) continue;
      const float* input = x + from * ldx + column - kReach * Dilation;
      for (int tap = first; tap < last; ++tap) {
        typename V::F value[Vectors];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) value[v] = V::load(input + tap * Dilation + v * V::kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          if (j - r < 0 || j - r >= K) continue;
          const auto w = V::set1(weight[(j - r) * K + tap]);
#pragma GCC unroll 3
          for (int v = 0; v < Vectors; ++v) sums[r][v] = V::fma(w, value[v], sums[r][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const int64_t to = row + r * Dilation;
      if (to >= height) break;
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = column + v * V::kWidth;
        store_columns<V>(y + to * ldy + at, width - at, sums[r][v]);
      }
    }
  }

  template <int Rows>
  void rows(int64_t row) const {
    int64_t left = (width + V::kWidth - 1) / V::kWidth, column = 0;
    while (left > 0) {
      const int64_t vectors = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
      if (vectors == 3) tile<Rows, 3>(row, column);
      else if (vectors == 2) tile<Rows, 2>(row, column);
      else tile<Rows, 1>(row, column);
      left -= vectors;
      column += vectors * V::kWidth;
    }
  }

  void run() const {
    for (int64_t phase = 0; phase < Dilation; ++phase) {
      for (int64_t row = phase; row < height;) {
        const int64_t left = (height - row + Dilation - 1) / Dilation;
        if (left >= 3) rows<4>(row), row += 4 * Dilation;
        else rows<2>(row), row += 2 * Dilation;
      }
    }
  }
};

template <class V, class T>
void widen(const void* x, int64_t ldx, int64_t rows, int64_t width, float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto* row = static_cast<const typename T::Stored*>(x) + r * ldx;
    int64_t i = 0;
    for (; i + V::kWidth <= width; i += V::kWidth) V::store(y + r * ldy + i, load_row<V, T>(row + i));
    for (; i < width; ++i) y[r * ldy + i] = T::read(row[i]);
  }
}

template <class V>
int64_t plane_scratch(int64_t height, int64_t width) {
  return height * (row_of<V>(width, 2) + row_of<V>(width, 9));
}

template <class V>
void large_kernel_plane(const LargeKernelPlane& plane, float* scratch) {
  const int64_t height = plane.height, width = plane.width;
  const int64_t ldx = row_of<V>(width, 2), ldy = row_of<V>(width, 9);
  float *x = scratch + 2, *y = scratch + height * ldx + 9;
  if (plane.type == Element::kFloat) widen<V, Float32>(plane.x, width, height, width, x, ldx);
  else if (plane.type == Element::kBFloat16) widen<V, BFloat16>(plane.x, width, height, width, x, ldx);
  else widen<V, Half>(plane.x, width, height, width, x, ldx);
  Depthwise<V, 5, 1>{x, ldx, plane.weight5, plane.bias5, y, ldy, height, width}.run();
  Depthwise<V, 7, 3>{y, ldy, plane.weight7, plane.bias7, plane.out, width, height, width}.run();
}

template <class V>
int64_t point_scratch(int64_t channels) {
  return (channels + kChannels) * kPixels;
}

// y [rows, n] = x (sums + bias)
template <class V, class T>
void finish_point(const LargeKernelPoint& point, const float* sums, int64_t channel, int64_t rows, int64_t first, int64_t n) {
  using Stored = typename T::Stored;
  for (int64_t r = 0; r < rows; ++r, sums += kPixels) {
    const int64_t at = (channel + r) * point.pixels + first;
    const auto* x = static_cast<const Stored*>(point.x) + at;
    auto* out = static_cast<Stored*>(point.out) + at;
    const float bias = point.bias[channel + r];
    const auto shift = V::set1(bias);
    int64_t i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth)
      store_row<V, T>(out + i, V::mul(load_row<V, T>(x + i), V::add(V::load(sums + i), shift)));
    for (; i < n; ++i) out[i] = T::round(T::read(x[i]) * (sums[i] + bias));
  }
}

template <class V>
void large_kernel_point(const LargeKernelPoint& point, int64_t first_channel, int64_t last_channel, int64_t first,
                        int64_t last, float* scratch) {
  const int64_t n = last - first, channels = point.channels;
  float *block = scratch, *sums = scratch + channels * kPixels;
  for (int64_t c = 0; c < channels; ++c) {  // close together: planes of 64 x 64 would fall on the same lines of the cache
    float* row = block + c * kPixels;
    for (int64_t i = 0; i < n; ++i) row[i] = point.t[c * point.ldt + first + i];
    for (int64_t i = n; i < kPixels; ++i) row[i] = 0.0f;
  }
  const int64_t columns = (n + V::kWidth - 1) / V::kWidth * V::kWidth;
  for (int64_t c = first_channel; c < last_channel; c += kChannels) {
    const int64_t rows = last_channel - c < kChannels ? last_channel - c : kChannels;
    multiply<V>({point.weight + c * channels, channels, 1}, block, kPixels, sums, kPixels, rows, channels, columns, false);
    if (point.type == Element::kFloat) finish_point<V, Float32>(point, sums, c, rows, first, n);
    else if (point.type == Element::kBFloat16) finish_point<V, BFloat16>(point, sums, c, rows, first, n);
    else finish_point<V, Half>(point, sums, c, rows, first, n);
  }
}

template <class V>
constexpr LargeKernelKernels large_kernel_attention_kernels() {
  return {kPixels, &plane_scratch<V>, &large_kernel_plane<V>, &point_scratch<V>, &large_kernel_point<V>};
}

}  // namespace
}  // namespace planmill
