// The kernels behind WinogradKernels, written once over a vector type of common/vec.h.
//
// A block of tiles is transformed, [36, tiles, channels]; then, a group of output channels at a time, 36 products with the
// transformed kernels, [36, tiles, group], and the output transform. The kernels come in panels of 16 output channels, as a
// register tile of the product walks down them: every block reads all of them, in order. Every output is summed in the
// order of the channels, whatever the block.
#pragma once

#include "common/products.h"
#include "common/vec.h"
#include "convolution/winograd.h"
#include "routing/rows_kernels.h"

namespace planmill {
namespace {

constexpr int64_t kTiles = 96;     // of a block: at 256 channels and 256 outputs 3.5 MB each of transforms and products
constexpr int64_t kOutputs = 256;  // of a group

inline int64_t whole_panels(int64_t outputs) { return (outputs + kWinogradPanel - 1) / kWinogradPanel * kWinogradPanel; }

inline int64_t group_of(const WinogradConvolution& conv) {
  const int64_t outputs = whole_panels(conv.out_channels);
  return outputs < kOutputs ? outputs : kOutputs;
}

inline int64_t winograd_scratch(const WinogradConvolution& conv) {
  return kWinogradTaps * kTiles * (conv.channels + group_of(conv));
}

// B^T d for the points 0, 1, -1, 1/2, -2 and infinity.
template <class V>
inline void transform_input(const typename V::F* d, int64_t step, typename V::F* out) {
  const auto d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const auto c = [](float x) { return V::set1(x); };
  const auto even = V::sub(d4, d2), odd = V::sub(d3, d1);
  out[0] = V::fma(c(1.5f), odd, V::add(d0, V::fma(c(-2.0f), d2, d4)));
  out[1] = V::fma(c(2.5f), d3, V::sub(V::fma(c(0.5f), d2, d4), d1));
  out[2] = V::fma(c(-2.5f), d2, V::add(V::fma(c(0.5f), d3, d4), d1));
  out[3] = V::fma(c(2.0f), odd, even);
  out[4] = V::fma(c(-0.5f), odd, even);
  out[5] = V::fma(c(1.5f), even, V::add(V::fma(c(-2.0f), d3, d1), d5));
}

// A^T m: Outputs sums of six products.
template <class V, int Outputs>
inline void transform_output(const typename V::F* m, int64_t step, typename V::F* out, int64_t out_step) {
  const auto sum = V::add(m[step], m[2 * step]), difference = V::sub(m[step], m[2 * step]);
  const auto half = m[3 * step], two = m[4 * step], last = m[5 * step];
  out[0] = V::add(V::add(m[0], sum), V::add(half, two));
  float small = 0.5f, large = -2.0f;
#pragma GCC unroll 5
  for (int i = 1; i < Outputs; ++i, small *= 0.5f, large *= -2.0f) {
    auto y = V::fma(V::set1(small), half, V::fma(V::set1(large), two, i % 2 == 1 ? difference : sum));
    if (i == Outputs - 1) y = V::add(y, last);
    out[i * out_step] = y;
  }
}

template <class V, class T>
inline typename V::F load_some(const typename T::Stored* p, int64_t count) {
  if (count >= V::kWidth) return load_row<V, T>(p);
  float x[V::kWidth] = {};
  for (int64_t i = 0; i < count; ++i) x[i] = T::read(p[i]);
  return V::load(x);
}

template <class V, class T>
inline void store_some(typename T::Stored* p, int64_t count, typename V::F value) {
  if (count >= V::kWidth) return store_row<V, T>(p, value);
  float x[V::kWidth];
  V::store(x, value);
  for (int64_t i = 0; i < count; ++i) p[i] = T::round(x[i]);
}

struct WinogradTile {
  int64_t image, row, column;  // of its first output
};

inline WinogradTile tile_at(const WinogradConvolution& conv, int64_t index) {
  const int64_t per_image = conv.tile_rows * conv.tile_columns, rest = index % per_image, side = 7 - conv.size;
  return {index / per_image, rest / conv.tile_columns * side, rest % conv.tile_columns * side};
}

// inputs [36, tiles, channels] of tiles [first, last)
template <class V, class T>
void transform_tiles(const WinogradConvolution& conv, int64_t first, int64_t last, float* inputs) {
  constexpr int64_t kSide = kWinogradSide;
  const int64_t tiles = last - first, channels = conv.channels;
  for (int64_t t = first; t < last; ++t) {
    const WinogradTile tile = tile_at(conv, t);
    const auto* image = static_cast<const typename T::Stored*>(conv.x) + tile.image * conv.height * conv.width * channels;
    float* to = inputs + (t - first) * channels;
    for (int64_t c = 0; c < channels; c += V::kWidth) {
      typename V::F half[kSide][kSide], column[kSide], result[kSide];
      for (int64_t j = 0; j < kSide; ++j) {
        const int64_t x = tile.column - conv.padding + j;
#pragma GCC unroll 6
        for (int64_t i = 0; i < kSide; ++i) {
          const int64_t y = tile.row - conv.padding + i;
          const bool inside = x >= 0 && x < conv.width && y >= 0 && y < conv.height;
          column[i] = inside ? load_some<V, T>(image + (y * conv.width + x) * channels + c, channels - c) : V::zero();
        }
        transform_input<V>(column, 1, result);
#pragma GCC unroll 6
        for (int64_t i = 0; i < kSide; ++i) half[i][j] = result[i];
      }
      for (int64_t i = 0; i < kSide; ++i) {
        transform_input<V>(half[i], 1, result);
#pragma GCC unroll 6
        for (int64_t j = 0; j < kSide; ++j)
          store_some<V, Float32>(to + (i * kSide + j) * tiles * channels + c, channels - c, result[j]);
      }
    }
  }
}

// outputs of channels [channel, channel + count) from products [36, tiles, stride]
template <class V, class T, int Outputs>
void finish_tiles(const WinogradConvolution& conv, int64_t first, int64_t last, const float* products, int64_t stride,
                  int64_t channel, int64_t count) {
  constexpr int64_t kSide = kWinogradSide;
  const int64_t tiles = last - first;
  for (int64_t t = first; t < last; ++t) {
    const WinogradTile tile = tile_at(conv, t);
    auto* image = static_cast<typename T::Stored*>(conv.out) +
                  tile.image * conv.out_height * conv.out_width * conv.out_channels + channel;
    const float* from = products + (t - first) * stride;
    for (int64_t c = 0; c < count; c += V::kWidth) {
      typename V::F column[kSide], half[Outputs][kSide], row[Outputs];
      for (int64_t j = 0; j < kSide; ++j) {
#pragma GCC unroll 6
        for (int64_t i = 0; i < kSide; ++i) column[i] = V::load(from + (i * kSide + j) * tiles * stride + c);
        transform_output<V, Outputs>(column, 1, row, 1);
#pragma GCC unroll 5
        for (int i = 0; i < Outputs; ++i) half[i][j] = row[i];
      }
      const auto bias = load_some<V, Float32>(conv.bias + channel + c, count - c);
      for (int64_t i = 0; i < Outputs && tile.row + i < conv.out_height; ++i) {
        transform_output<V, Outputs>(half[i], 1, row, 1);
        for (int64_t j = 0; j < Outputs && tile.column + j < conv.out_width; ++j) {
          auto* out = image + ((tile.row + i) * conv.out_width + tile.column + j) * conv.out_channels + c;
          store_some<V, T>(out, count - c, V::add(row[j], bias));
        }
      }
    }
  }
}

template <class V, class T>
void finish_tiles(const WinogradConvolution& conv, int64_t first, int64_t last, const float* products, int64_t stride,
                  int64_t channel, int64_t count) {
  if (conv.size == 2) finish_tiles<V, T, 5>(conv, first, last, products, stride, channel, count);
  else if (conv.size == 3) finish_tiles<V, T, 4>(conv, first, last, products, stride, channel, count);
  else if (conv.size == 4) finish_tiles<V, T, 3>(conv, first, last, products, stride, channel, count);
  else finish_tiles<V, T, 2>(conv, first, last, products, stride, channel, count);
}

template <class V, class T>
void run_tiles(const WinogradConvolution& conv, int64_t first, int64_t last, float* scratch) {
  const int64_t tiles = last - first, channels = conv.channels, stride = group_of(conv);
  float *inputs = scratch, *products = inputs + kWinogradTaps * tiles * channels;
  transform_tiles<V, T>(conv, first, last, inputs);
  for (int64_t channel = 0; channel < conv.out_channels; channel += kOutputs) {
    const int64_t left = conv.out_channels - channel, count = left < kOutputs ? left : kOutputs;
    for (int64_t tap = 0; tap < kWinogradTaps; ++tap) {
      const float* kernel = conv.transformed + (tap * whole_panels(conv.out_channels) + channel) * channels;
      for (int64_t panel = 0; panel < count; panel += kWinogradPanel)
        multiply<V>({inputs + tap * tiles * channels, channels, 1}, kernel + panel * channels, kWinogradPanel,
                    products + tap * tiles * stride + panel, stride, tiles, channels, kWinogradPanel, false);
    }
    finish_tiles<V, T>(conv, first, last, products, stride, channel, count);
  }
}

template <class V>
void run_winograd(const WinogradConvolution& conv, int64_t first, int64_t last, float* scratch) {
  if (conv.type == Element::kFloat) run_tiles<V, Float32>(conv, first, last, scratch);
  else if (conv.type == Element::kBFloat16) run_tiles<V, BFloat16>(conv, first, last, scratch);
  else run_tiles<V, Half>(conv, first, last, scratch);
}

template <class V>
constexpr WinogradKernels winograd_kernels() {
  return {kTiles, &winograd_scratch, &run_winograd<V>};
}

}  // namespace
}  // namespace planmill
