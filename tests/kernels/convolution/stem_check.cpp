// stem_convolution of one instruction set against sums in double: blocks of any rows, every kind of pooling.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "convolution/stem.h"

using namespace planmill;

namespace {

struct Setting {
  int channels, outputs, height, width, below, beside, stride, padding;
  StemPooling pooling;
  int pool_size, pool_stride, pool_padding;
  bool count_padding;
};

constexpr StemPooling kNone = StemPooling::kNone, kMax = StemPooling::kMax, kAverage = StemPooling::kAverage;
constexpr Setting kSettings[] = {
    {3, 40, 13, 20, 4, 4, 1, 3, kAverage, 2, 2, 1, true}, {2, 17, 15, 41, 7, 7, 2, 3, kMax, 3, 2, 1, true},
    {1, 16, 9, 30, 3, 2, 1, 1, kNone, 1, 1, 0, true},     {3, 5, 11, 9, 2, 3, 1, 2, kAverage, 3, 1, 1, false},
    {1, 33, 8, 14, 3, 3, 1, 0, kMax, 2, 3, 0, true},      {2, 49, 7, 13, 2, 2, 3, 6, kNone, 1, 1, 0, true}};

// A number of the convolution after ReLU.
double convolved(const Setting& s, const StemConvolution& conv, const std::vector<float>& x, int y, int column, int k) {
  double sum = conv.bias[k];
  for (int c = 0; c < s.channels; ++c)
    for (int i = 0; i < s.below; ++i)
      for (int j = 0; j < s.beside; ++j) {
        const int row = y * s.stride - s.padding + i, at = column * s.stride - s.padding + j;
        const int tap = (c * s.below + i) * s.beside + j, taps = s.channels * s.below * s.beside;
        if (row < 0 || row >= s.height || at < 0 || at >= s.width) continue;
        sum += static_cast<double>(x[(c * s.height + row) * s.width + at]) *
               conv.packed[(k / kStemPanel * taps + tap) * kStemPanel + k % kStemPanel];
      }
  return std::max(sum, 0.0);
}

double wanted(const Setting& s, const StemConvolution& conv, const std::vector<float>& x, int y, int column, int k) {
  double sum = 0.0, most = -INFINITY;
  int seen = 0;
  for (int i = 0; i < s.pool_size; ++i)
    for (int j = 0; j < s.pool_size; ++j) {
      const int row = y * s.pool_stride - s.pool_padding + i, at = column * s.pool_stride - s.pool_padding + j;
      if (row < 0 || row >= conv.conv_height || at < 0 || at >= conv.conv_width) continue;
      const double value = convolved(s, conv, x, row, at, k);
      sum += value, most = std::max(most, value), ++seen;
    }
  if (s.pooling != kAverage) return most;
  return sum / (s.count_padding ? s.pool_size * s.pool_size : seen);
}

int failures(const Setting& s, std::mt19937& generator, const StemKernels& kernels) {
  std::normal_distribution<float> normal;
  const int panels = (s.outputs + kStemPanel - 1) / kStemPanel, taps = s.channels * s.below * s.beside;
  std::vector<float> x(s.channels * s.height * s.width), packed(panels * taps * kStemPanel), bias(panels * kStemPanel);
  for (auto* numbers : {&x, &packed, &bias})
    for (float& number : *numbers) number = normal(generator);
  const auto side = [](int n, int size, int stride, int padding) { return (n + 2 * padding - size) / stride + 1; };
  StemConvolution conv{};
  conv.type = Element::kFloat, conv.x = x.data(), conv.image_step = 0;
  conv.channel_step = s.height * s.width, conv.row_step = s.width, conv.column_step = 1;
  conv.height = s.height, conv.width = s.width, conv.channels = s.channels;
  conv.packed = packed.data(), conv.bias = bias.data(), conv.outputs = s.outputs;
  conv.kernel_height = s.below, conv.kernel_width = s.beside, conv.stride = s.stride, conv.padding = s.padding;
  conv.conv_height = side(s.height, s.below, s.stride, s.padding);
  conv.conv_width = side(s.width, s.beside, s.stride, s.padding);
  conv.relu = true, conv.pooling = s.pooling, conv.pool_size = s.pool_size, conv.pool_stride = s.pool_stride;
  conv.pool_padding = s.pool_padding, conv.count_padding = s.count_padding;
  conv.out_height = side(conv.conv_height, s.pool_size, s.pool_stride, s.pool_padding);
  conv.out_width = side(conv.conv_width, s.pool_size, s.pool_stride, s.pool_padding);
  std::vector<float> out(conv.out_height * conv.out_width * s.outputs, NAN);
  conv.out = out.data();
  int failed = 0;
  for (const int block : {1, 3, 100}) {
    const int64_t rows = std::min<int64_t>((block - 1) * s.pool_stride + s.pool_size, conv.conv_height);
    conv.strip_rows = (rows - 1) * s.stride + s.below, conv.strip_width = (conv.conv_width - 1) * s.stride + s.beside;
    std::vector<int64_t> offsets;
    for (int c = 0; c < s.channels; ++c)
      for (int i = 0; i < s.below; ++i)
        for (int j = 0; j < s.beside; ++j) offsets.push_back((c * conv.strip_rows + i) * conv.strip_width + j);
    conv.taps = offsets.data();
    for (int64_t first = 0; first < conv.out_height; first += block) {
      std::vector<float> scratch(kernels.scratch(conv), NAN);
      kernels.run(conv, 0, first, std::min(conv.out_height, first + block), scratch.data());
    }
    for (int y = 0; y < conv.out_height; ++y)
      for (int column = 0; column < conv.out_width; ++column)
        for (int k = 0; k < s.outputs; ++k) {
          const float got = out[(y * conv.out_width + column) * s.outputs + k];
          failed += !(std::fabs(got - wanted(s, conv, x, y, column, k)) <= 1e-4);
        }
    std::fill(out.begin(), out.end(), NAN);
  }
  return failed;
}

}  // namespace

int main() {
  std::mt19937 generator(1);
  int failed = 0;
  for (const Setting& setting : kSettings) failed += failures(setting, generator, *KERNELS());
  std::printf("%d failures\n", failed);
  return failed != 0;
}
