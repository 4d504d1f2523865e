// Arithmetic of the mahalanobis op: rows of a triangular factor times vectors.
#pragma once

#include <cstdint>

namespace planmill {

constexpr int64_t kTriangleRows = 12;  // rows of a triangle that are widened together and used for all vectors

struct MahalanobisKernels {
  int64_t width;  // vectors [d] are padded with zeros to a multiple of this
  // squares[v] = sum over the rows i of a lower triangle, packed row by row, of (sum over j <= i of g[i][j] r[v][j])^2,
  // for `count` vectors `stride` apart. The triangle is float32, or bfloat16 as uint16; `rows` has room for
  // kTriangleRows padded rows.
  void (*square_float)(const float* triangle, int64_t d, const float* r, int64_t stride, int64_t count, float* rows,
                       double* squares);
  void (*square_bfloat16)(const uint16_t* triangle, int64_t d, const float* r, int64_t stride, int64_t count, float* rows,
                          double* squares);
};

const MahalanobisKernels* mahalanobis_baseline();
const MahalanobisKernels* mahalanobis_avx2();
const MahalanobisKernels* mahalanobis_avx512();

}  // namespace planmill
