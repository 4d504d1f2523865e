// What the two ways of sparse_encoding share: one that reads all weights in float32, one that screens them first.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "neighbors/screening.h"
#include "neighbors/shortlist.h"

namespace planmill {

struct Latent {
  float key, value;  // key: what is compared, larger first
  int32_t index;
  bool operator<(const Latent& other) const { return key > other.key || (key == other.key && index < other.index); }
};

struct RowBuffers {
  std::vector<float> rows, own, values;
};

struct Encoder {
  const Rows& x;
  const Rows& weight;
  const float* bias;   // [M] or null
  const float* theta;  // [M], or null unless thresholds decide
  int64_t k;
  bool absolute;
  const ScreenKernels& screen;
  float* values;
  int32_t *indices, *counts;

  // h of the token `own` [D] for `count` latents, in float32; the same bits whoever asks.
  void scores(const float* own, const int32_t* index, int64_t count, float* out, RowBuffers& buffers) const;
  bool active(float h, int32_t index) const {
    return (absolute ? std::fabs(h) : h) > 0.0f && (theta == nullptr || h >= theta[index]);
  }
  Latent latent(float h, int32_t index) const { return {absolute ? std::fabs(h) : h, h, index}; }
  void write(int64_t t, const std::vector<Latent>& sorted, int64_t active) const;
  // For a token all of whose scores are NaN: NaN, so that decoding shows it, with the lowest indices.
  void write_nothing_known(int64_t t) const;

  // All latents of these tokens, evaluated.
  void scan(const std::vector<int64_t>& tokens) const;
  // All tokens, screened; false where a row of the weights does not fit the frame.
  bool screen_all(const Frame& frame) const;
};

}  // namespace planmill
