// Bounds of sparse_encoding: from a token's raw products with latents (neighbors/screen.h) to what their scores can be.
//
// With the token scaled by s_x and the weights by s_w, v = s_x s_w h = x.w + factor * bias; errors of the 16-bit product as
// in screen.h, and of float32 arithmetic, by which candidates are evaluated again:
//     |v - exact| <= slope * norm + reach * res + rounding |factor * bias| + floor
// Latents that must never be listed (padding, scores that are always NaN) have bias = NaN: every comparison is false.
#pragma once

#include <cstdint>

namespace planmill {

struct TokenBound {
  float inv;     // scale of the token's 16-bit numbers
  float factor;  // s_x s_w
  float slope, reach, floor;
};

struct Latents {
  const float *inv, *norm, *res, *bias, *theta;  // theta: threshold of each latent, at least 0; may be null
};

struct EncodingKernels {
  // The largest lower bound of v (of |v| if `absolute`) in disjoint groups of eight columns; returns their number.
  int64_t (*group_bounds)(const float* t, int64_t columns, TokenBound token, Latents latents, bool absolute, float* out);
  // Columns whose upper bound of v (of |v|) reaches `least` and factor * theta, with both bounds.
  int64_t (*list_active)(const float* t, int64_t columns, TokenBound token, Latents latents, bool absolute, float least,
                         int32_t* found, float* low, float* high);
};

// `integer`: the products are int32, else float: see ScreenKernels.
const EncodingKernels* encoding_baseline(bool integer);
const EncodingKernels* encoding_avx2(bool integer);
const EncodingKernels* encoding_avx512(bool integer);

}  // namespace planmill
