// A linear layer whose weight lies in panels, as a register tile of its product walks down them.
#pragma once

#include <cstdint>

namespace planmill {

constexpr int64_t kLinearPanel = 16;  // output channels that stand together

enum class LinearActivation : int { kNone, kGelu, kGeluTanh, kRelu, kSilu };

// out = activation(bias + x weight^T)
struct PackedLinear {
  const float* x;       // [rows, channels]
  int64_t rows, channels, outputs;
  const float* packed;  // [panels, channels, 16], zeros beyond outputs
  const float* bias;    // [outputs]
  LinearActivation activation;
  float* out;           // [rows, outputs]
};

struct PackedLinearKernels {
  int64_t rows;  // of a register tile
  // Rows [first_row, last_row) of the output channels of panels [first_panel, last_panel).
  void (*run)(const PackedLinear& linear, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel);
};

const PackedLinearKernels* packed_linear_baseline();
const PackedLinearKernels* packed_linear_avx2();
const PackedLinearKernels* packed_linear_avx512();

}  // namespace planmill
