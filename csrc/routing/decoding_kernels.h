// The kernels behind DecodingKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
#include "routing/decoding.h"

namespace planmill {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

// Rows lie anywhere in a matrix larger than the caches, so the next ones are asked for a line at a time, in step.
template <class V, int Rows>
inline void add_some(float* out, const float* const* rows, const float* scale, int64_t d,
                     const void* const* next, int64_t next_bytes) {
  typename V::F factor[Rows];
  for (int r = 0; r < Rows; ++r) factor[r] = V::set1(scale[r]);
  const char* ahead[4];
  for (int r = 0; r < 4; ++r) ahead[r] = static_cast<const char*>(next[r]);
  int64_t i = 0;
  for (; i + V::kWidth <= d; i += V::kWidth) {
    const int64_t byte = i * 4;
    if (byte % kLine == 0 && byte < next_bytes)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
        if (ahead[r] != nullptr) __builtin_prefetch(ahead[r] + byte);
    auto sum = V::load(out + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sum = V::fma(factor[r], V::load(rows[r] + i), sum);
    V::store(out + i, sum);
  }
  for (; i < d; ++i)
    for (int r = 0; r < Rows; ++r) out[i] += scale[r] * rows[r][i];
}

template <class V>
void add_rows(float* out, const float* const* rows, const float* scale, int64_t count, int64_t d,
              const void* const* next, int64_t next_bytes) {
  if (count == 4) return add_some<V, 4>(out, rows, scale, d, next, next_bytes);
  if (count == 3) return add_some<V, 3>(out, rows, scale, d, next, next_bytes);
  if (count == 2) return add_some<V, 2>(out, rows, scale, d, next, next_bytes);
  if (count == 1) add_some<V, 1>(out, rows, scale, d, next, next_bytes);
}

inline void widen_bfloat16(const uint16_t* row, int64_t d, float* out) {
  for (int64_t i = 0; i < d; ++i) {
    const uint32_t word = static_cast<uint32_t>(row[i]) << 16;
    __builtin_memcpy(out + i, &word, 4);
  }
}

// By integers: exact for every float16, and the compiler turns it into vector code on every instruction set.
inline void widen_float16(const uint16_t* row, int64_t d, float* out) {
  for (int64_t i = 0; i < d; ++i) {
    const uint32_t half = row[i], sign = (half & 0x8000u) << 16;
    uint32_t word = (half & 0x7fffu) << 13;  // exponent and mantissa where float32 has them, 112 too low in exponent
    float value;
    __builtin_memcpy(&value, &word, 4);
    value *= 0x1p112f;  // also brings subnormal numbers into range, exactly
    __builtin_memcpy(&word, &value, 4);
    word = (half & 0x7c00u) == 0x7c00u ? word | 0x7f800000u : word;  // infinity and NaN
    word |= sign;
    __builtin_memcpy(out + i, &word, 4);
  }
}

template <class V>
constexpr DecodingKernels decoding_kernels() {
  return {&add_rows<V>, &widen_bfloat16, &widen_float16};
}

}  // namespace
}  // namespace planmill
