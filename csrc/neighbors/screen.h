// Screening: a 16-bit matrix product whose error is bounded row by row, so that exact work is left to few candidates.
//
// A row x is stored as 16-bit numbers q with a scale: x = inv * q + (rest of length <= res). For two rows
//     |x.y - inv_x inv_y (q_x.q_y)| <= res_x |y| + (|x| + res_x) res_y      (Cauchy-Schwarz, twice)
// Floats (screen_floats.h): rows are stored as they are, and what is bounded is the rounding of the sum.
// Integers (AVX2, AVX-512): rows are scaled to a length below 2^15.5, so that a 32-bit sum can never overflow and the
// product is exact. bf16 (AMX): rows are scaled to length one; the float32 sum adds |x||y| D 2^-24.
// The value screened is v = x.y - half_y: with half = |y|^2/2 the nearest row has the largest v, with half = 0 it is the
// inner product. Padding rows and rows that hold NaN or infinity have half = infinity, and are never chosen.
#pragma once

#include <cstdint>

namespace planmill {

struct RowStats {
  float inv;   // scale of the 16-bit numbers
  float half;  // half the squared length; of the rounded row if asked
  float norm;  // length, rounded up
  float res;   // length of the rounding residual, rounded up; includes the error of the sum
};

// The same, as arrays over rows.
struct StatsView {
  float *inv, *half, *norm, *res;
};

struct Counts {
  int64_t found, others;
};

// The kernels of one instruction set. Left rows are packed into panels of `left_panel` rows, right rows into panels of
// `right_panel`; a packed row is `pairs` 32-bit words of two 16-bit numbers, zero-padded (or of bytes: screen_bytes.h).
struct ScreenKernels {
  const char* name;
  int left_panel, right_panel;
  bool rows_behind;      // a left panel is one prepared row behind the other, `words` floats each
  bool integer;          // products arrive as int32, else as float
  int64_t left_rows;     // rows of a left block that keep the caches busy but not full

  // out = x * scale - centre (null: no centre); returns the largest |x|, infinity where x holds NaN or infinity.
  float (*prepare)(const float* x, int64_t d, float scale, const float* centre, float* out);
  // Words of a packed row of d numbers.
  int64_t (*words)(int64_t d);
  // 16-bit form of x [d]; `rounded` asks for the length of the rounded row in `half`.
  void (*quantize_left)(const float* x, int64_t d, int64_t pairs, bool rounded, uint32_t* out, RowStats* stats);
  void (*quantize_right)(const float* x, int64_t d, int64_t pairs, bool rounded, uint32_t* out, RowStats* stats);
  // A panel from its rows [left_panel or right_panel][pairs].
  void (*put_left)(const uint32_t* rows, int64_t pairs, uint32_t* panel);
  void (*put_right)(const uint32_t* rows, int64_t pairs, uint32_t* panel);

  // out[left][right] (raw, row stride ld) = left . right
  void (*multiply)(const uint32_t* left, const uint32_t* right, int64_t left_panels, int64_t right_panels, int64_t pairs,
                   void* out, int64_t ld);

  // Raw products to inner products in place, with the largest lower bound of v per left row (low_left) and per
  // right row (low_right; null to leave out); both are running maxima.
  void (*lower_bounds)(float* t, int64_t rows, int64_t columns, int64_t ld, StatsView left, StatsView right,
                       float* low_left, float* low_right);
  // Columns of one row that may be its best (upper bound of v >= threshold), in `found`; and columns whose best this row
  // may be (upper bound >= low_right; null to leave out) without being in `found`, in `others` with that bound.
  Counts (*candidates)(const float* t, int64_t columns, RowStats left, StatsView right, float threshold,
                       const float* low_right, int32_t* found, int32_t* others, float* bounds);
  // Raw products to the largest v per left and per right row (running maxima), without bounds.
  void (*maxima)(float* t, int64_t rows, int64_t columns, int64_t ld, StatsView left, StatsView right, float* best_left,
                 float* best_right);
  // The largest lower bound (without `bounded`, value) of v in disjoint groups of up to eight columns of one row of raw
  // products; returns the number of groups, columns / 8 where the columns fill its vectors.
  int64_t (*group_bounds)(const float* t, int64_t columns, RowStats left, StatsView right, bool bounded, float* out);
  // Raw products of one row to v; columns with v (+ bound if `bounded`) >= threshold are listed with lower and upper
  // bounds of v.
  int64_t (*list_above)(float* t, int64_t columns, RowStats left, StatsView right, bool bounded, float threshold,
                        int32_t* found, float* low, float* high);

  // lower_bounds with the second largest lower bounds as well, `left_step` and `right_step` behind the largest ones.
  void (*two_lower_bounds)(float* t, int64_t rows, int64_t columns, int64_t ld, StatsView left, StatsView right,
                           float* low_left, int64_t left_step, float* low_right, int64_t right_step);
  // Columns of one row of inner products that may be its best (upper bound of v >= threshold) or whose best it may be
  // (>= low_right), each with the upper bound of the inner product.
  int64_t (*list_pairs)(const float* t, int64_t columns, RowStats left, StatsView right, float threshold,
                        const float* low_right, int32_t* found, float* upper);

  // Columns of one row of raw products that may be its best, given that another one has v of at least `low`, which goes up
  // with theirs; and the largest upper bound of v among the others (`rest`; null to leave out). Overwrites the products.
  int64_t (*list_nearest)(float* t, int64_t columns, RowStats left, StatsView right, float* low, int32_t* found, float* rest);

  // Exact float32 work on candidates.
  void (*squared_distances)(const float* x, const float* const* y, int64_t count, int64_t d, float* out);
  void (*dots)(const float* x, const float* const* y, int64_t count, int64_t d, float* out);
};

const ScreenKernels* screen_baseline();
const ScreenKernels* screen_avx2();
const ScreenKernels* screen_avx512();
const ScreenKernels* screen_amx();
const ScreenKernels* screen_floats_baseline();
const ScreenKernels* screen_floats_avx2();
const ScreenKernels* screen_floats_avx512();
const ScreenKernels* screen_bytes_avx2();
const ScreenKernels* screen_bytes_avx512();

}  // namespace planmill
