// Keys and values in the panels that CorrelationTile asks for.
#pragma once

#include <cstdint>

#include "attention/correlation.h"
#include "common/products.h"

namespace planmill {
namespace {

// Rows [rows, width] of one head in a strided tensor; the columns lie next to each other.
struct HeadRows {
  const float* data;
  int64_t stride, rows, width;
};

// Keys of panel p, transposed: [width][kPanel].
inline void pack_keys(const HeadRows& head, int64_t p, float* panel) {
  const int64_t first = p * kPanel, count = head.rows - first < kPanel ? head.rows - first : kPanel;
  transpose(head.data + first * head.stride, head.stride, count, head.width, panel, kPanel, kPanel);
}

// Values of panel p: kPanel rows of each block of columns, blocks lying `rows` rows apart.
inline void pack_values(const HeadRows& head, int64_t p, int64_t rows, float* values) {
  for (int64_t c = 0; c < head.width; c += kPanel) {
    const int64_t columns = head.width - c < kPanel ? head.width - c : kPanel;
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t key = p * kPanel + j;
      float* out = values + (c / kPanel * rows + key) * kPanel;
      for (int64_t x = 0; x < kPanel; ++x)
        out[x] = key < head.rows && x < columns ? head.data[key * head.stride + c + x] : 0.0f;
    }
  }
}

}  // namespace
}  // namespace planmill
