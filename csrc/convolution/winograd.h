// A convolution by Winograd's minimal filtering: the tiles of a block, by the output transform of the products.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace planmill {

constexpr int64_t kWinogradSide = 6;                               // of an input tile
constexpr int64_t kWinogradTaps = kWinogradSide * kWinogradSide;  // products of a tile and a pair of channels
constexpr int64_t kWinogradPanel = 16;                            // output channels that stand together
constexpr int64_t kWinogradGroup = 4;                             // panels that are computed together

// out = bias + sum over channels of x convolved with a square kernel of `size` (2 to 5) taps a side; both channels-last.
struct WinogradConvolution {
  Element type;                             // of x and out
  const void* x;                            // [images, height, width, channels]
  int64_t height, width, channels;
  const float* transformed;                 // [36, panels, channels, 16], zeros beyond out_channels
  const float* bias;                        // [out_channels]
  void* out;                                // [images, out_height, out_width, out_channels]
  int64_t out_height, out_width, out_channels;
  int64_t size, padding;
  int64_t tile_rows, tile_columns;          // of an image; a tile gives 7 - size outputs a side
};

struct WinogradKernels {
  int64_t (*block)(const WinogradConvolution& convolution);    // tiles that a call takes at most
  int64_t (*scratch)(const WinogradConvolution& convolution);  // floats that a call needs
  // Outputs of tiles [first, last), counted over all images, of the channels of panels [first_panel, last_panel), which are
  // whole groups but for the last.
  void (*run)(const WinogradConvolution& convolution, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
              float* scratch);
};

const WinogradKernels* winograd_baseline();
const WinogradKernels* winograd_avx2();
const WinogradKernels* winograd_avx512();

}  // namespace planmill
