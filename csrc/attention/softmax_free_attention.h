// softmax_free_attention: Y = Cm pinv(A) (Cm^T V), over tiles of queries; the kernels of one head.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace planmill {

// One head. Queries and landmarks are taken around the mean landmark. Padded widths are whole vectors and hold zeros.
struct SoftHead {
  const void* q;  // rows of d, `q_row` apart, columns next to each other
  const void* v;
  Element type;
  int64_t q_row, v_row;
  int64_t m, d, dv;
  int64_t ld, ldv;     // m and dv, padded
  float scale;
  const float* centre;      // [d]: the mean landmark
  const float* landmarks;   // [m, d]
  const float* transposed;  // [d, ld]
  const float* half_norms;  // [ld]: |L_j|^2 / 2
};

struct SoftInverse {
  int64_t m, ld, ldv;
  bool normalize;
  int64_t iterations;  // of Newton; -1: solve by Cholesky
};

constexpr int64_t kSoftTile = 48;  // queries of a tile: whole register tiles of every instruction set
constexpr int64_t kSoftBlock = 16;  // rows of a block of the factor: whole vectors of every instruction set
constexpr int64_t kSoftHalvings = 10;

struct SoftKernels {
  int64_t width;  // floats of a vector
  // centre, transposed and half_norms of a head from its landmarks [m, d], which become those around the centre.
  void (*prepare)(float* landmarks, int64_t m, int64_t d, int64_t ld, float* centre, float* transposed, float* half_norms);
  // w [m, ldv] = Cm^T V over the queries [first, last); scratch: soft_scratch floats.
  void (*gather)(const SoftHead& head, int64_t first, int64_t last, float* w, float* scratch);
  // P [m, ld] = A + ridge I, and the row sums [m] of A; the largest of them (NaN if one is) is returned.
  float (*gram)(const SoftHead& head, float ridge, float* p, float* sums);
  // norms [kSoftHalvings + 1]: the largest column sum of |I - alpha P P| for alpha, alpha / 2, alpha / 4, ...
  void (*step_norms)(const SoftInverse& inverse, const float* p, float alpha, float* norms, float* scratch);
  // w [m, ldv] -> pinv w; P is lost; scratch: soft_inverse_scratch floats.
  void (*invert)(const SoftInverse& inverse, float* p, const float* sums, float alpha, float* w, float* scratch);
  // Rows [first, last) of Y = Cm U in the head's dtype; out is that of row `first`, dv wide.
  void (*scatter)(const SoftHead& head, int64_t first, int64_t last, const float* u, void* out, float* scratch);
};

inline int64_t soft_scratch(const SoftHead& head) {  // of gather and scatter
  return kSoftTile * (head.d + 1 + head.ld + head.ldv);
}

inline int64_t soft_inverse_scratch(const SoftInverse& inverse) {
  const int64_t widest = inverse.ld > inverse.ldv ? inverse.ld : inverse.ldv;
  return 3 * inverse.m * inverse.ld + (inverse.m + kSoftBlock) * widest;
}

const SoftKernels* softmax_free_attention_baseline();
const SoftKernels* softmax_free_attention_avx2();
const SoftKernels* softmax_free_attention_avx512();

}  // namespace planmill
