// Row arithmetic of dictionary_lookup.
#pragma once

#include <cstdint>

namespace planmill {

constexpr int64_t kWidened = 8;  // rows of doubles are zero-padded to a multiple: a register of AVX-512

// Sums over numbers above tau: of y - tau, of its square, and of one.
struct Above {
  double sum, squares, count;
};

// Scores are exact products summed in double, results are multiply-adds of float32 in the order of the atoms: whatever
// kernel computes a number, its bits are the same.
struct LookupKernels {
  // out[j] = x . rows[j]
  void (*dots)(const float* x, const float* const* rows, int64_t count, int64_t d, double* out);
  // The same for queries x, widened to rows of doubles that lie ldx apart, against four rows: out[4 * query + row].
  void (*four_rows)(const double* x, int64_t ldx, int64_t queries, const float* const* rows, int64_t d, double* out);
  Above (*above)(const double* y, int64_t n, double tau);
  // out += sum of weights[j] * rows[j] over n numbers
  void (*add_rows)(float* out, const float* const* rows, const float* weights, int64_t count, int64_t n);
  // The same for out [queries, n] and weights [queries, count], of consecutive rows: the rows of each lie ld* apart.
  void (*add_products)(float* out, int64_t ldo, const float* rows, int64_t ldr, const float* weights, int64_t ldw,
                       int64_t queries, int64_t count, int64_t n);
};

const LookupKernels* lookup_baseline();
const LookupKernels* lookup_avx2();
const LookupKernels* lookup_avx512();

}  // namespace planmill
