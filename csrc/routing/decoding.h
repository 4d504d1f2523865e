// Row arithmetic of sparse_decoding.
#pragma once

#include <cstdint>

namespace planmill {

struct DecodingKernels {
  // out[i] += scale[0] * rows[0][i] + ... in this order, for `count` rows (1 to 4). `next` [4]: rows of `next_bytes` that
  // the caller will ask for next, fetched meanwhile; null entries are left out.
  void (*add_rows)(float* out, const float* const* rows, const float* scale, int64_t count, int64_t d,
                   const void* const* next, int64_t next_bytes);
  // 16-bit rows to float32.
  void (*widen_bfloat16)(const uint16_t* row, int64_t d, float* out);
  void (*widen_float16)(const uint16_t* row, int64_t d, float* out);
};

const DecodingKernels* decoding_baseline();
const DecodingKernels* decoding_avx2();
const DecodingKernels* decoding_avx512();

}  // namespace planmill
