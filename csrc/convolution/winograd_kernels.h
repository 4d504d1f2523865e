// The kernels behind WinogradKernels, written once over a vector type of common/vec.h.
//
// A block of tiles is transformed, [36, tiles, channels]; then, a few panels of 16 output channels at a time, 36
// products with the transformed kernels, [36, panels, tiles, 16], and the output transform. What a block holds stays in
// cache next to the kernels that stream past it; a product asks the memory for what the next one reads. Every output is
// summed in the order of the channels, whatever the block.
#pragma once

#include "common/element_rows.h"
#include "common/products.h"
#include "common/vec.h"
#include "convolution/winograd.h"

namespace planmill {
namespace {

constexpr int64_t kBytes = 1800000;  // of a block's transformed inputs: 48 tiles of 256 channels
constexpr int64_t kMostBytes = 12000000;
constexpr int64_t kLine = 16;        // floats of a cache line

// Tiles of a block: whole register tiles of the product; where its inputs leave the second-level cache anyway, as many as
// make up for a kernel that comes from memory at every block.
inline int64_t winograd_block(const WinogradConvolution& conv) {
  const int64_t channels = conv.channels < 1 ? 1 : conv.channels, bytes = kWinogradTaps * 4;
  const int64_t fit = kBytes / (bytes * channels) / 12 * 12, most = kMostBytes / (bytes * channels) / 12 * 12;
  if (fit < 48) return most < 12 ? 12 : most > 72 ? 72 : most;
  return fit > 192 ? 192 : fit;
}

// Floats between the same number of two taps: 36 streams that advance together must not fall into the same cache sets.
inline int64_t spread(int64_t count) { return (count + 1023) / 1024 * 1024 + kLine; }

// How a block lies in the scratch memory.
struct WinogradScratch {
  int64_t row, input_step;  // of the inputs: floats between tiles, and between taps
  int64_t product_step;     // of the products: floats between taps
};

inline WinogradScratch winograd_layout(const WinogradConvolution& conv, int64_t tiles) {
  const int64_t row = conv.channels + kLine;
  return {row, spread(tiles * row), spread(tiles * kWinogradGroup * kWinogradPanel)};
}

inline int64_t winograd_scratch(const WinogradConvolution& conv) {
  const WinogradScratch layout = winograd_layout(conv, winograd_block(conv));
  return kWinogradTaps * (layout.input_step + layout.product_step) + conv.channels;
}

// B^T d for the points 0, 1, -1, 1/2, -2 and infinity.
template <class V>
inline void transform_input(const typename V::F* d, int64_t step, typename V::F* out) {
  const auto d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const auto even = V::sub(d4, d2), odd = V::sub(d3, d1);
  out[0] = V::fma(V::set1(1.5f), odd, V::add(d0, V::fma(V::set1(-2.0f), d2, d4)));
  out[1] = V::fma(V::set1(2.5f), d3, V::sub(V::fma(V::set1(0.5f), d2, d4), d1));
  out[2] = V::fma(V::set1(-2.5f), d2, V::add(V::fma(V::set1(0.5f), d3, d4), d1));
  out[3] = V::fma(V::set1(2.0f), odd, even);
  out[4] = V::fma(V::set1(-0.5f), odd, even);
  out[5] = V::fma(V::set1(1.5f), even, V::add(V::fma(V::set1(-2.0f), d3, d1), d5));
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

struct WinogradTile {
  int64_t image, row, column;  // of its first output
};

inline WinogradTile tile_at(const WinogradConvolution& conv, int64_t index) {
  const int64_t per_image = conv.tile_rows * conv.tile_columns, rest = index % per_image, side = 7 - conv.size;
  return {index / per_image, rest / conv.tile_columns * side, rest % conv.tile_columns * side};
}

// A vector of channels of a tile: pixels + c to 36 numbers that lie `step` apart.
template <class V, class T>
inline void transform_tile(const typename T::Stored* const* pixels, int64_t c, float* to, int64_t step) {
  constexpr int64_t kSide = kWinogradSide;
  typename V::F half[kSide][kSide], column[kSide], result[kSide];
#pragma GCC unroll 6
  for (int64_t j = 0; j < kSide; ++j) {
#pragma GCC unroll 6
    for (int64_t i = 0; i < kSide; ++i) column[i] = load_row<V, T>(pixels[i * kSide + j] + c);
    transform_input<V>(column, 1, result);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kSide; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kSide; ++i) {
    transform_input<V>(half[i], 1, result);
#pragma GCC unroll 6
    for (int64_t j = 0; j < kSide; ++j) V::store(to + (i * kSide + j) * step, result[j]);
  }
}

// The channels from c on, fewer than a vector: rows of the inputs have room for a whole one.
template <class V, class T>
void transform_rest(const typename T::Stored* const* pixels, int64_t c, int64_t channels, float* to, int64_t step) {
  float copies[kWinogradTaps][V::kWidth] = {};
  const float* rest[kWinogradTaps];
  for (int64_t tap = 0; tap < kWinogradTaps; ++tap) {
    for (int64_t i = 0; c + i < channels; ++i) copies[tap][i] = T::read(pixels[tap][c + i]);
    rest[tap] = copies[tap];
  }
  transform_tile<V, Float32>(rest, 0, to, step);
}

// Inputs of tiles [first, last); `zeros` is a pixel outside the image.
template <class V, class T>
void transform_tiles(const WinogradConvolution& conv, int64_t first, int64_t last, const void* zeros, float* inputs,
                     WinogradScratch layout) {
  using Stored = typename T::Stored;
  constexpr int64_t kSide = kWinogradSide;
  const int64_t channels = conv.channels;
  for (int64_t t = first; t < last; ++t) {
    const WinogradTile tile = tile_at(conv, t);
    const auto* image = static_cast<const Stored*>(conv.x) + tile.image * conv.height * conv.width * channels;
    const Stored* pixels[kWinogradTaps];
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t j = 0; j < kSide; ++j) {
        const int64_t y = tile.row - conv.padding + i, x = tile.column - conv.padding + j;
        const bool inside = x >= 0 && x < conv.width && y >= 0 && y < conv.height;
        pixels[i * kSide + j] = inside ? image + (y * conv.width + x) * channels : static_cast<const Stored*>(zeros);
      }
    float* to = inputs + (t - first) * layout.row;
    int64_t c = 0;
    for (; c + V::kWidth <= channels; c += V::kWidth) transform_tile<V, T>(pixels, c, to + c, layout.input_step);
    if (c < channels) transform_rest<V, T>(pixels, c, channels, to + c, layout.input_step);
  }
}

// A vector of outputs of a tile from 36 products that lie `step` apart; `rows` and `columns` of them are in the image.
// Inlined into its loop it spills what the loop holds.
template <class V, class T, int Outputs>
__attribute__((noinline)) void finish_tile(const float* from, int64_t step, typename V::F bias, typename T::Stored* out,
                                           int64_t row_step, int64_t column_step, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = kWinogradSide;
  typename V::F column[kSide], half[Outputs][kSide], row[Outputs];
#pragma GCC unroll 6
  for (int64_t j = 0; j < kSide; ++j) {
#pragma GCC unroll 6
    for (int64_t i = 0; i < kSide; ++i) column[i] = V::load(from + (i * kSide + j) * step);
    transform_output<V, Outputs>(column, 1, row, 1);
#pragma GCC unroll 5
    for (int i = 0; i < Outputs; ++i) half[i][j] = row[i];
  }
#pragma GCC unroll 5
  for (int64_t i = 0; i < Outputs; ++i) {
    if (i >= rows) break;
    transform_output<V, Outputs>(half[i], 1, row, 1);
#pragma GCC unroll 5
    for (int64_t j = 0; j < Outputs; ++j) {
      if (j >= columns) break;
      store_row<V, T>(out + i * row_step + j * column_step, V::add(row[j], bias));
    }
  }
}

// The same for `count` outputs, fewer than a vector.
template <class V, class T, int Outputs>
void finish_rest(const float* from, int64_t step, const float* bias, int64_t count, typename T::Stored* out,
                 int64_t row_step, int64_t column_step, int64_t rows, int64_t columns) {
  float shift[V::kWidth] = {}, whole[Outputs][Outputs][V::kWidth];
  for (int64_t c = 0; c < count; ++c) shift[c] = bias[c];
  constexpr int64_t kColumn = V::kWidth, kRow = Outputs * kColumn;
  finish_tile<V, Float32, Outputs>(from, step, V::load(shift), whole[0][0], kRow, kColumn, Outputs, Outputs);
  for (int64_t i = 0; i < Outputs && i < rows; ++i)
    for (int64_t j = 0; j < Outputs && j < columns; ++j)
      for (int64_t c = 0; c < count; ++c) out[i * row_step + j * column_step + c] = T::round(whole[i][j][c]);
}

// Outputs of channels [channel, channel + count), at most a panel, from their products of the first tap, [tiles, 16].
template <class V, class T, int Outputs>
void finish_panel(const WinogradConvolution& conv, int64_t first, int64_t last, const float* products, int64_t step,
                  int64_t channel, int64_t count) {
  constexpr int64_t kAhead = 2;  // tiles
  const int64_t column_step = conv.out_channels, row_step = conv.out_width * column_step;
  for (int64_t t = first; t < last; ++t, products += kWinogradPanel) {
    const WinogradTile tile = tile_at(conv, t);
    auto* out = static_cast<typename T::Stored*>(conv.out) + (tile.image * conv.out_height + tile.row) * row_step +
                tile.column * column_step + channel;
    const int64_t rows = conv.out_height - tile.row, columns = conv.out_width - tile.column;
    for (int64_t tap = 0; tap < kWinogradTaps; ++tap)
      __builtin_prefetch(products + tap * step + kAhead * kWinogradPanel);
    for (int64_t c = 0; c < count; c += V::kWidth) {
      const float* bias = conv.bias + channel + c;
      if (count - c >= V::kWidth)
        finish_tile<V, T, Outputs>(products + c, step, V::load(bias), out + c, row_step, column_step, rows, columns);
      else
        finish_rest<V, T, Outputs>(products + c, step, bias, count - c, out + c, row_step, column_step, rows, columns);
    }
  }
}

template <class V, class T>
void finish_panel(const WinogradConvolution& conv, int64_t first, int64_t last, const float* products, int64_t step,
                  int64_t channel, int64_t count) {
  if (conv.size == 2) finish_panel<V, T, 5>(conv, first, last, products, step, channel, count);
  else if (conv.size == 3) finish_panel<V, T, 4>(conv, first, last, products, step, channel, count);
  else if (conv.size == 4) finish_panel<V, T, 3>(conv, first, last, products, step, channel, count);
  else finish_panel<V, T, 2>(conv, first, last, products, step, channel, count);
}

// What a product asks the memory for while it runs: the kernel of the next panel and a share of the next tap's inputs.
struct WinogradNext {
  const float *kernel, *inputs;
  int64_t lines;  // of the kernel for a turn
};

constexpr int64_t kTurn = 32;  // channels that a product adds before it asks again

// c [Rows, 16] = a [Rows, channels] b [channels, 16]. As `multiply` of common/products.h, but four channels a step, as
// that is fewer instructions, and each turn asks for what comes next.
template <class V, int Rows>
inline void multiply_tile(const float* a, int64_t row, const float* b, float* c, int64_t channels, WinogradNext next) {
  constexpr int kVectors = V::kWidth >= 16 ? 1 : 2;
  for (int64_t first = 0; first < kWinogradPanel; first += kVectors * V::kWidth) {
    typename V::F sums[Rows][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] = V::zero();
    for (int64_t p = 0; p < channels;) {
      for (int64_t i = 0; i < next.lines; ++i, next.kernel += kLine) __builtin_prefetch(next.kernel, 0, 2);
      for (int i = 0; i < Rows * kTurn / (kWinogradGroup * kLine); ++i, next.inputs += kLine)
        __builtin_prefetch(next.inputs, 0, 2);
      const int64_t last = p + kTurn < channels ? p + kTurn : channels;
#pragma GCC unroll 4
      for (; p < last; ++p) {
        typename V::F right[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) right[j] = V::load(b + p * kWinogradPanel + first + j * V::kWidth);
#pragma GCC unroll 12
        for (int i = 0; i < Rows; ++i) {
          const auto x = V::set1(a[i * row + p]);
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) sums[i][j] = V::fma(x, right[j], sums[i][j]);
        }
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) V::store(c + i * kWinogradPanel + first + j * V::kWidth, sums[i][j]);
  }
}

// Fewer tiles than a register tile has: as many sums at once, since one alone waits for itself at every channel.
template <class V, int Rows>
void multiply_rest(const float* inputs, int64_t row, int64_t tiles, int64_t channels, const float* kernel,
                   WinogradNext next, float* products) {
  if constexpr (Rows > 0) {
    if (tiles == Rows) multiply_tile<V, Rows>(inputs, row, kernel, products, channels, next);
    else multiply_rest<V, Rows - 1>(inputs, row, tiles, channels, kernel, next, products);
  }
}

// products [tiles, 16] of a tap and a panel.
template <class V>
void multiply_panel(const float* inputs, int64_t row, int64_t tiles, int64_t channels, const float* kernel,
                    WinogradNext next, float* products) {
  constexpr int64_t kRows = kProductRows<V>;
  int64_t t = 0;
  for (; t + kRows <= tiles; t += kRows) {
    multiply_tile<V, kRows>(inputs + t * row, row, kernel, products + t * kWinogradPanel, channels, next);
    next.kernel += (channels + kTurn - 1) / kTurn * next.lines * kLine;
    next.inputs += kRows * row;
  }
  multiply_rest<V, static_cast<int>(kRows) - 1>(inputs + t * row, row, tiles - t, channels, kernel, next,
                                                products + t * kWinogradPanel);
}

template <class V, class T>
void run_tiles(const WinogradConvolution& conv, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
               float* scratch) {
  const int64_t tiles = last - first, channels = conv.channels;
  const int64_t panels = (conv.out_channels + kWinogradPanel - 1) / kWinogradPanel;
  const WinogradScratch layout = winograd_layout(conv, tiles);
  float *inputs = scratch, *products = inputs + kWinogradTaps * layout.input_step;
  float* zeros = products + kWinogradTaps * layout.product_step;
  for (int64_t i = 0; i < channels; ++i) zeros[i] = 0.0f;
  transform_tiles<V, T>(conv, first, last, zeros, inputs, layout);
  const int64_t steps = tiles / kProductRows<V>, lines = steps < 1 ? 1 : (kTurn + steps - 1) / steps;
  const auto kernel = [&](int64_t tap, int64_t panel) {
    return conv.transformed + (tap * panels + panel) * channels * kWinogradPanel;
  };
  for (int64_t begin = first_panel; begin < last_panel; begin += kWinogradGroup) {
    const int64_t end = begin + kWinogradGroup < last_panel ? begin + kWinogradGroup : last_panel;
    for (int64_t tap = 0; tap < kWinogradTaps; ++tap)
      for (int64_t panel = begin; panel < end; ++panel) {
        const bool ends_group = panel + 1 == end, ends_taps = tap + 1 == kWinogradTaps;
        const float* next_kernel = !ends_group  ? kernel(tap, panel + 1)
                                   : !ends_taps ? kernel(tap + 1, begin)
                                                : kernel(0, end < last_panel ? end : first_panel);
        const float* next_inputs = inputs + (ends_taps ? 0 : tap + 1) * layout.input_step;
        const int64_t share = (panel - begin) * kProductRows<V> * layout.row / kWinogradGroup;
        const WinogradNext next{next_kernel, next_inputs + share, lines};
        multiply_panel<V>(inputs + tap * layout.input_step, layout.row, tiles, channels, kernel(tap, panel), next,
                          products + tap * layout.product_step + (panel - begin) * tiles * kWinogradPanel);
      }
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t channel = panel * kWinogradPanel, left = conv.out_channels - channel;
      finish_panel<V, T>(conv, first, last, products + (panel - begin) * tiles * kWinogradPanel, layout.product_step,
                         channel, left < kWinogradPanel ? left : kWinogradPanel);
    }
  }
}

template <class V>
void run_winograd(const WinogradConvolution& conv, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
                  float* scratch) {
  if (conv.type == Element::kFloat) run_tiles<V, Float32>(conv, first, last, first_panel, last_panel, scratch);
  else if (conv.type == Element::kBFloat16) run_tiles<V, BFloat16>(conv, first, last, first_panel, last_panel, scratch);
  else run_tiles<V, Half>(conv, first, last, first_panel, last_panel, scratch);
}

template <class V>
constexpr WinogradKernels winograd_kernels() {
  return {&winograd_block, &winograd_scratch, &run_winograd<V>};
}

}  // namespace
}  // namespace planmill
