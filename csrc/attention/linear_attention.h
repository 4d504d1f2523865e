// Tiles of linear attention on one head of one sample: sums of phi(k) v^T, and what queries make of them.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace planmill {

enum class FeatureMap : int { kElu = 0, kRelu = 1, kSquaredRelu = 2, kIdentity = 3 };

// Rows of q, k and v lie `*_row` numbers apart, those of out `values`. `mask`: one byte a key, null: all are there.
struct LinearHead {
  Element type;
  const void* q;
  const void* k;
  const void* v;
  int64_t q_row, k_row, v_row;
  const uint8_t* mask;
  void* out;
  int64_t width, values;  // D, E
  FeatureMap map;
  bool normalize;
  float scale, eps;
};

// A state is M [D, E padded] and z [D padded], `state` numbers; zero before any key.
struct LinearAttentionKernels {
  int64_t (*state)(int64_t width, int64_t values);
  int64_t (*scratch)(int64_t width, int64_t values);
  // state += the keys [first, last)
  void (*add_keys)(const LinearHead& head, int64_t first, int64_t last, float* state, float* scratch);
  // The queries [first, last) against a state.
  void (*apply)(const LinearHead& head, int64_t first, int64_t last, const float* state, float* scratch);
  // The queries [first, last), each against a state and the keys from `first` to itself; then state += those keys, with
  // the bits of `add_keys` into zeros and `add`.
  void (*causal)(const LinearHead& head, int64_t first, int64_t last, float* state, float* scratch);
  // total += part
  void (*add)(float* total, const float* part, int64_t n);
};

const LinearAttentionKernels* linear_attention_baseline();
const LinearAttentionKernels* linear_attention_avx2();
const LinearAttentionKernels* linear_attention_avx512();

}  // namespace planmill
