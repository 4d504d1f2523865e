// The kernels behind StemKernels, written once over a vector type of common/vec.h.
//
// The rows of the image that a call needs are copied between zeros: what is then read are taps of pixels that lie
// `stride` apart, from the first-level cache, without a check and without a matrix of patches. One row of the
// convolution, for the channels of a register tile, is pooled along the row at once and kept for the rows of the result
// that need it; the convolution as a whole is nowhere. Every output is summed in the order of the taps, and pooled from
// the left and from above, whatever the block and the tile.
#pragma once

#include "common/element_rows.h"
#include "common/products.h"
#include "common/vec.h"
#include "common/vec_math.h"
#include "convolution/stem.h"

namespace planmill {
namespace {

inline int64_t padded_outputs(const StemConvolution& conv) {
  return (conv.outputs + kStemPanel - 1) / kStemPanel * kStemPanel;
}

// How a call's scratch memory is divided.
struct StemScratch {
  float* strip;   // [channels, strip_rows, strip_width]
  float* row;     // [conv_width, channels of a tile]
  float* pooled;  // [groups of channels, pool_size, out_width, channels of a group]: row i of the convolution at i % size
};

template <class V>
int64_t stem_scratch(const StemConvolution& conv) {
  const int64_t pooled = conv.pool_size * conv.out_width * padded_outputs(conv);
  return conv.channels * conv.strip_rows * conv.strip_width + conv.conv_width * 2 * V::kWidth + pooled;
}

template <class V>
inline StemScratch divide(const StemConvolution& conv, float* scratch) {
  float* row = scratch + conv.channels * conv.strip_rows * conv.strip_width;
  return {scratch, row, row + conv.conv_width * 2 * V::kWidth};
}

// Rows of the padded image, the first one `top` below the first row of the image itself.
template <class T>
void fill_strip(const StemConvolution& conv, int64_t image, int64_t top, int64_t rows, float* strip) {
  const auto* x = static_cast<const typename T::Stored*>(conv.x) + image * conv.image_step;
  const int64_t begin = conv.padding < conv.strip_width ? conv.padding : conv.strip_width;
  const int64_t end = conv.padding + conv.width < conv.strip_width ? conv.padding + conv.width : conv.strip_width;
  for (int64_t c = 0; c < conv.channels; ++c)
    for (int64_t i = 0; i < rows; ++i) {
      float* to = strip + (c * conv.strip_rows + i) * conv.strip_width;
      const int64_t y = top + i;
      if (y < 0 || y >= conv.height) {
        for (int64_t j = 0; j < conv.strip_width; ++j) to[j] = 0.0f;
        continue;
      }
      const auto* from = x + c * conv.channel_step + y * conv.row_step;
      for (int64_t j = 0; j < begin; ++j) to[j] = 0.0f;
      if (conv.column_step == 1)
        for (int64_t j = begin; j < end; ++j) to[j] = T::read(from[j - conv.padding]);
      else
        for (int64_t j = begin; j < end; ++j) to[j] = T::read(from[(j - conv.padding) * conv.column_step]);
      for (int64_t j = end; j < conv.strip_width; ++j) to[j] = 0.0f;
    }
}

// The first `count` numbers of a vector, rounded to what T stores.
template <class V, class T>
inline void store_some(typename T::Stored* to, int64_t count, typename V::F value) {
  if (count >= V::kWidth) return store_row<V, T>(to, value);
  float x[V::kWidth];
  V::store(x, value);
  for (int64_t i = 0; i < count; ++i) to[i] = T::round(x[i]);
}

// `Pixels` neighbours of a row of the convolution, from the first tap of the first one on: Vectors of channels each, of
// which the first `count` are stored, `step` apart. Stride: of the convolution, 0 where it is known at run time only.
template <class V, class T, int Pixels, int Vectors, int Stride>
inline void stem_tile(const StemConvolution& conv, const float* left, int64_t channel, typename T::Stored* to,
                      int64_t step, int64_t count) {
  constexpr int W = V::kWidth;
  const int64_t depth = conv.channels * conv.kernel_height * conv.kernel_width;
  const int64_t stride = Stride > 0 ? Stride : conv.stride;
  typename V::F sums[Pixels][Vectors];
  const float* right[Vectors];
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) {
    const int64_t at = channel + j * W;
    right[j] = conv.packed + at / kStemPanel * depth * kStemPanel + at % kStemPanel;
    const auto bias = V::load(conv.bias + at);
#pragma GCC unroll 12
    for (int i = 0; i < Pixels; ++i) sums[i][j] = bias;
  }
#pragma GCC unroll 4
  for (int64_t p = 0; p < depth; ++p) {
    const float* tap = left + conv.taps[p];
    typename V::F weights[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) weights[j] = V::load(right[j] + p * kStemPanel);
#pragma GCC unroll 12
    for (int i = 0; i < Pixels; ++i) {
      const auto x = V::set1(tap[i * stride]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sums[i][j] = V::fma(x, weights[j], sums[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Pixels; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      const auto value = conv.relu ? relu<V>(sums[i][j]) : sums[i][j];
      store_some<V, T>(to + i * step + j * W, count - j * W, value);
    }
}

// A row of the convolution, from the first tap of its first pixel on. The last tile overlaps the one before.
template <class V, class T, int Vectors, int Stride>
void stem_row(const StemConvolution& conv, const float* left, int64_t channel, typename T::Stored* to, int64_t step,
              int64_t count) {
  constexpr int64_t kPixels = kProductRows<V>;
  const int64_t width = conv.conv_width;
  if (width < kPixels) {
    for (int64_t x = 0; x < width; ++x)
      stem_tile<V, T, 1, Vectors, Stride>(conv, left + x * conv.stride, channel, to + x * step, step, count);
    return;
  }
  for (int64_t x = 0; x < width; x += kPixels) {
    if (x + kPixels > width) x = width - kPixels;
    stem_tile<V, T, kPixels, Vectors, Stride>(conv, left + x * conv.stride, channel, to + x * step, step, count);
  }
}

template <class V, class T, int Vectors>
void stem_row(const StemConvolution& conv, const float* left, int64_t channel, typename T::Stored* to, int64_t step,
              int64_t count) {
  if (conv.stride == 1) stem_row<V, T, Vectors, 1>(conv, left, channel, to, step, count);
  else if (conv.stride == 2) stem_row<V, T, Vectors, 2>(conv, left, channel, to, step, count);
  else stem_row<V, T, Vectors, 0>(conv, left, channel, to, step, count);
}

// The larger one; NaN where either is.
template <class V>
inline typename V::F larger(typename V::F a, typename V::F b) {
  const auto found = V::max(a, b);  // b where either is NaN
  if (__builtin_expect(V::mask_ge(a, a) == (1u << V::kWidth) - 1, 1)) return found;
  float x[V::kWidth], y[V::kWidth];
  V::store(x, a), V::store(y, found);
  for (int i = 0; i < V::kWidth; ++i) y[i] = x[i] == x[i] ? y[i] : x[i];
  return V::load(y);
}

template <class V, StemPooling Pooling>
inline typename V::F pooled_with(typename V::F a, typename V::F b) {
  if constexpr (Pooling == StemPooling::kMax) return larger<V>(a, b);
  else return V::add(a, b);
}

// Pixels of the convolution [first, last) that a window along one side sees.
struct StemWindow {
  int64_t first, last;
};

inline StemWindow window_of(const StemConvolution& conv, int64_t index, int64_t side) {
  const int64_t first = index * conv.pool_stride - conv.pool_padding, last = first + conv.pool_size;
  return {first < 0 ? 0 : first, last < side ? last : side};
}

// A pixel of a row of the result of pooling along the row: `count` pixels from `from` on.
template <class V, int Vectors, StemPooling Pooling>
inline void pool_pixel(const float* from, int64_t count, float* to) {
  constexpr int64_t kChannels = Vectors * V::kWidth;
  typename V::F found[Vectors];
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) found[j] = V::load(from + j * V::kWidth);
#pragma GCC unroll 4
  for (int64_t i = 1; i < count; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j)
      found[j] = pooled_with<V, Pooling>(found[j], V::load(from + i * kChannels + j * V::kWidth));
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) V::store(to + j * V::kWidth, found[j]);
}

// Windows of one row: [conv_width, channels] to [out_width, channels]. Size: of a window, 0 for any.
template <class V, int Vectors, StemPooling Pooling, int Size>
void pool_row(const StemConvolution& conv, const float* row, float* to) {
  constexpr int64_t kChannels = Vectors * V::kWidth;
  const int64_t size = Size > 0 ? Size : conv.pool_size;
  for (int64_t x = 0; x < conv.out_width;) {
    const StemWindow window = window_of(conv, x, conv.conv_width);
    const float* from = row + window.first * kChannels;
    if (window.last - window.first < size) {  // at a border
      pool_pixel<V, Vectors, Pooling>(from, window.last - window.first, to + x++ * kChannels);
      continue;
    }
    const int64_t whole = (conv.conv_width - size - window.first) / conv.pool_stride + 1;
    const int64_t last = whole < conv.out_width - x ? x + whole : conv.out_width;
    for (; x < last; ++x, from += conv.pool_stride * kChannels)
      pool_pixel<V, Vectors, Pooling>(from, size, to + x * kChannels);
  }
}

template <class V, int Vectors, StemPooling Pooling>
void pool_row(const StemConvolution& conv, const float* row, float* to) {
  if (conv.pool_size == 2) pool_row<V, Vectors, Pooling, 2>(conv, row, to);
  else if (conv.pool_size == 3) pool_row<V, Vectors, Pooling, 3>(conv, row, to);
  else pool_row<V, Vectors, Pooling, 0>(conv, row, to);
}

// A row of the result from the pooled rows of its window, each at its place in [pool_size, out_width, channels].
template <class V, class T, int Vectors, StemPooling Pooling>
void finish_row(const StemConvolution& conv, const float* pooled, StemWindow rows, typename T::Stored* to, int64_t count) {
  constexpr int64_t kChannels = Vectors * V::kWidth;
  const int64_t size = conv.out_width * kChannels, most = conv.pool_size, height = rows.last - rows.first;
  const int64_t start = rows.first % most;
  for (int64_t x = 0; x < conv.out_width; ++x, pooled += kChannels, to += conv.outputs) {
    typename V::F found[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) found[j] = V::load(pooled + start * size + j * V::kWidth);
    for (int64_t i = 1, slot = start; i < height; ++i) {
      slot = slot + 1 == most ? 0 : slot + 1;
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j)
        found[j] = pooled_with<V, Pooling>(found[j], V::load(pooled + slot * size + j * V::kWidth));
    }
    if constexpr (Pooling == StemPooling::kAverage) {
      int64_t area = most * most;
      if (!conv.count_padding) {
        const StemWindow window = window_of(conv, x, conv.conv_width);
        area = height * (window.last - window.first);
      }
      const auto share = V::set1(1.0f / static_cast<float>(area));
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) found[j] = V::mul(found[j], share);
    }
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) store_some<V, T>(to + j * V::kWidth, count - j * V::kWidth, found[j]);
  }
}

// Channels from `channel` on of a row of the result. `left`: the first tap of the first row of its window that is new;
// the rows before are in `pooled` from the row of the result before this one.
template <class V, class T, int Vectors, StemPooling Pooling>
void stem_group(const StemConvolution& conv, const float* left, StemWindow rows, int64_t new_row, int64_t channel,
                StemScratch scratch, typename T::Stored* to) {
  constexpr int64_t kChannels = Vectors * V::kWidth;
  const int64_t count = conv.outputs - channel;
  if constexpr (Pooling == StemPooling::kNone) {
    stem_row<V, T, Vectors>(conv, left, channel, to, conv.outputs, count);
  } else {
    float* pooled = scratch.pooled + channel * conv.pool_size * conv.out_width;
    for (int64_t row = new_row; row < rows.last; ++row, left += conv.stride * conv.strip_width) {
      stem_row<V, Float32, Vectors>(conv, left, channel, scratch.row, kChannels, kChannels);
      pool_row<V, Vectors, Pooling>(conv, scratch.row, pooled + row % conv.pool_size * conv.out_width * kChannels);
    }
    finish_row<V, T, Vectors, Pooling>(conv, pooled, rows, to, count);
  }
}

template <class V, class T, StemPooling Pooling>
void stem_rows(const StemConvolution& conv, int64_t image, int64_t first, int64_t last, float* memory) {
  const StemScratch scratch = divide<V>(conv, memory);
  const int64_t begin = window_of(conv, first, conv.conv_height).first;
  const int64_t end = window_of(conv, last - 1, conv.conv_height).last, padded = padded_outputs(conv);
  fill_strip<T>(conv, image, begin * conv.stride - conv.padding, (end - 1 - begin) * conv.stride + conv.kernel_height,
                scratch.strip);
  auto* out = static_cast<typename T::Stored*>(conv.out) + image * conv.out_height * conv.out_width * conv.outputs;
  int64_t done = begin;
  for (int64_t y = first; y < last; ++y) {
    const StemWindow rows = window_of(conv, y, conv.conv_height);
    const int64_t row = rows.first > done ? rows.first : done;
    const float* left = scratch.strip + (row - begin) * conv.stride * conv.strip_width;
    auto* to = out + y * conv.out_width * conv.outputs;
    int64_t c = 0;
    for (; c + 2 * V::kWidth <= padded; c += 2 * V::kWidth)
      stem_group<V, T, 2, Pooling>(conv, left, rows, row, c, scratch, to + c);
    if constexpr (2 * V::kWidth > kStemPanel)
      if (c < padded) stem_group<V, T, 1, Pooling>(conv, left, rows, row, c, scratch, to + c);
    done = rows.last;
  }
}

template <class V, class T>
void stem_rows(const StemConvolution& conv, int64_t image, int64_t first, int64_t last, float* scratch) {
  switch (conv.pooling) {
    case StemPooling::kNone:
      return stem_rows<V, T, StemPooling::kNone>(conv, image, first, last, scratch);
    case StemPooling::kMax:
      return stem_rows<V, T, StemPooling::kMax>(conv, image, first, last, scratch);
    case StemPooling::kAverage:
      return stem_rows<V, T, StemPooling::kAverage>(conv, image, first, last, scratch);
  }
}

template <class V>
void run_stem(const StemConvolution& conv, int64_t image, int64_t first, int64_t last, float* scratch) {
  if (conv.type == Element::kFloat) stem_rows<V, Float32>(conv, image, first, last, scratch);
  else if (conv.type == Element::kBFloat16) stem_rows<V, BFloat16>(conv, image, first, last, scratch);
  else stem_rows<V, Half>(conv, image, first, last, scratch);
}

template <class V>
constexpr StemKernels stem_kernels() {
  return {&stem_scratch<V>, &run_stem<V>};
}

}  // namespace
}  // namespace planmill
