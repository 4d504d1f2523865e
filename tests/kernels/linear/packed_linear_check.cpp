// packed_linear of one instruction set against double arithmetic: every number of rows of a tile, columns around panels.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "linear/packed_linear.h"

using namespace planmill;

int main() {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const PackedLinearKernels& kernels = *KERNELS();
  int failed = 0;
  for (const int channels : {0, 1, 7, 300, 513})
    for (const int outputs : {1, 15, 16, 17, 50})
      for (int rows = 1; rows <= 25; rows += rows < 13 ? 1 : 12) {
        const int panels = (outputs + kLinearPanel - 1) / kLinearPanel;
        std::vector<float> x(rows * channels), packed(panels * channels * kLinearPanel), bias(outputs);
        for (auto* numbers : {&x, &bias})
          for (float& number : *numbers) number = normal(generator);
        for (int p = 0; p < panels; ++p)
          for (int k = 0; k < channels; ++k)
            for (int lane = 0; lane < kLinearPanel; ++lane)
              packed[(p * channels + k) * kLinearPanel + lane] = p * kLinearPanel + lane < outputs ? normal(generator) : 0.0f;
        std::vector<float> out(rows * outputs, NAN);
        const PackedLinear linear{x.data(),    rows,        channels,                 outputs,
                                  packed.data(), bias.data(), LinearActivation::kRelu, out.data()};
        kernels.run(linear, 0, rows / 2, 0, panels);
        kernels.run(linear, rows / 2, rows, 0, panels / 2);
        kernels.run(linear, rows / 2, rows, panels / 2, panels);
        for (int r = 0; r < rows; ++r)
          for (int n = 0; n < outputs; ++n) {
            double sum = bias[n], size = std::fabs(bias[n]);
            for (int k = 0; k < channels; ++k) {
              const double term = static_cast<double>(x[r * channels + k]) *
                                  packed[(n / kLinearPanel * channels + k) * kLinearPanel + n % kLinearPanel];
              sum += term, size += std::fabs(term);
            }
            failed += !(std::fabs(out[r * outputs + n] - std::fmax(sum, 0.0)) <= 1e-6 * size);
          }
      }
  std::printf("%d failures\n", failed);
  return failed != 0;
}
