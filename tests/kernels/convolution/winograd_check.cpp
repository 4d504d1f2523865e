// winograd_convolution of one instruction set: the delta kernel gives back the image, whatever the block of tiles.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "convolution/winograd.h"

using namespace planmill;

namespace {

constexpr double kPoints[] = {0.0, 1.0, -1.0, 0.5, -2.0};

// G of a kernel that has one tap, in its corner, for one side: a point's share, and nothing of infinity's but at size 1.
double share(int i) {
  if (i == 5) return 0.0;
  double distance = 1.0;
  for (int j = 0; j < 5; ++j)
    if (j != i) distance *= kPoints[i] - kPoints[j];
  return 1.0 / distance;
}

}  // namespace

int main() {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const WinogradKernels& kernels = *KERNELS();
  int failed = 0;
  for (const int size : {2, 3, 4, 5})
    for (const int channels : {1, 17, 40})
      for (const int outputs : {1, 70}) {
        const int images = 2, height = 11, width = 14, padding = size / 2, side = 7 - size;
        const int out_height = height + 2 * padding - size + 1, out_width = width + 2 * padding - size + 1;
        const int panels = (outputs + kWinogradPanel - 1) / kWinogradPanel;
        std::vector<float> x(images * height * width * channels), bias(outputs), weight(outputs * channels);
        for (auto* numbers : {&x, &bias, &weight})
          for (float& number : *numbers) number = normal(generator);
        std::vector<float> transformed(kWinogradTaps * panels * channels * kWinogradPanel);
        for (int tap = 0; tap < kWinogradTaps; ++tap)
          for (int k = 0; k < outputs; ++k)
            for (int c = 0; c < channels; ++c)
              transformed[((tap * panels + k / kWinogradPanel) * channels + c) * kWinogradPanel + k % kWinogradPanel] =
                  static_cast<float>(weight[k * channels + c] * share(tap / 6) * share(tap % 6));
        std::vector<float> out(images * out_height * out_width * outputs, NAN);
        const WinogradConvolution convolution{
            Element::kFloat, x.data(), height, width, channels, transformed.data(), bias.data(), out.data(), out_height,
            out_width, outputs, size, padding, (out_height + side - 1) / side, (out_width + side - 1) / side};
        const int64_t tiles = images * convolution.tile_rows * convolution.tile_columns;
        std::vector<float> scratch(kernels.scratch(convolution));
        const int64_t block = std::min<int64_t>(kernels.block(convolution), 13);
        for (int64_t first = 0; first < tiles; first += block) {
          for (float& number : scratch) number = NAN;
          for (int panel = 0; panel < panels; panel += kWinogradGroup)
            kernels.run(convolution, first, std::min(tiles, first + block), panel,
                        std::min<int64_t>(panels, panel + kWinogradGroup), scratch.data());
        }
        for (int image = 0; image < images; ++image)
          for (int i = 0; i < out_height; ++i)
            for (int j = 0; j < out_width; ++j)
              for (int k = 0; k < outputs; ++k) {
                const int row = i - padding, column = j - padding;
                double sum = bias[k], most = 1.0;
                for (int c = 0; c < channels; ++c) {
                  if (row >= 0 && row < height && column >= 0 && column < width)
                    sum += static_cast<double>(weight[k * channels + c]) *
                           x[((image * height + row) * width + column) * channels + c];
                  most += std::fabs(weight[k * channels + c]);
                }
                const float got = out[((image * out_height + i) * out_width + j) * outputs + k];
                failed += !(std::fabs(got - sum) <= 3e-5 * most);
              }
      }
  std::printf("%d failures\n", failed);
  return failed != 0;
}
