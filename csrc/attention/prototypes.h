// Attention of tokens to a few prototypes by relu(tau cosine), with the output projection folded into their values.
#pragma once

#include <cstdint>

namespace planmill {

constexpr int64_t kPrototypeRows = 24;  // tokens of a tile
constexpr int64_t kPrototypeBlock = 64;  // columns of the table that lie together

// out[i] = bias + sum over h, m of relu(tau[h] <q[i, h], k[h, m]> / max(|q[i, h]|, 1e-12)) table[h, m]
struct PrototypeTile {
  const float* q;  // row i, head h at q + i * row + h * head
  int64_t row, head, rows;
  int64_t heads, width, prototypes;
  const float* keys;   // unit, [heads][width][prototypes rounded up to kPrototypePad]
  const float* tau;    // [heads]
  const float* table;  // [ceil(columns / 64)][heads * prototypes][64]
  const float* bias;   // [columns rounded up to 64]
  int64_t columns;
  float* out;  // [rows][columns rounded up to 64]
};

constexpr int64_t kPrototypePad = 16;  // a whole number of vectors of any width

struct PrototypeKernels {
  // scratch: rows * (rounded prototypes + heads * prototypes)
  void (*mix)(const PrototypeTile& tile, float* scratch);
};

const PrototypeKernels* prototypes_baseline();
const PrototypeKernels* prototypes_avx2();
const PrototypeKernels* prototypes_avx512();

}  // namespace planmill
