// The screen in 8-bit numbers: twice the products per instruction of the 16-bit one, under an error bound 70 times as
// wide. It pays where the best row of many is well apart from most of them; callers fall back to 16 bits where it is not.
//
// Left rows are unsigned (q + 64), right rows signed. AVX2 multiplies such bytes into 16-bit sums that wrap: a sum over a
// block of 16 words starts at -64 times the sum of its right numbers, and what remains is the product of the signed
// numbers, at most 32767 in magnitude since both rows are scaled for it (Cauchy-Schwarz, block by block). VNNI sums in 32
// bits; it reads the same words. A packed row is, for each block, one word with these starts and up to 16 words of data.
#pragma once

#include "neighbors/screen_kernels.h"

namespace planmill {
namespace {

constexpr int64_t kBlockWords = 16, kBlockValues = 4 * kBlockWords;
constexpr int64_t kBlocksPerPass = 15;  // as kPairBlock: 255 words
constexpr int kOffset = 64;  // as in V::start_quads
// Of each 32 numbers that share a 16-bit sum: lengths whose product is below 2^15. Rounding adds at most sqrt(32) / 2.
constexpr float kLeftLength = 144.0f, kRightLength = 224.0f, kLengthRounding = 2.9f;
static_assert(kLeftLength * kRightLength < 32768.0f);
constexpr float kLeftTop = 62.5f, kRightTop = 126.5f;  // |q| <= 63 and <= 127: a pair of products fits in 16 bits

inline int64_t words_of_bytes(int64_t d) {
  const int64_t data = (d + 3) / 4;
  return data + (data + kBlockWords - 1) / kBlockWords;
}

// Block `first` of x [d]: in place, or in `buffer` with zeros behind it.
inline const float* block_of(const float* x, int64_t first, int64_t d, float* buffer) {
  if (first + kBlockValues <= d) return x + first;
  for (int64_t i = 0; i < kBlockValues; ++i) buffer[i] = first + i < d ? x[first + i] : 0.0f;
  return buffer;
}

// The largest sum of squares of the numbers that share a 16-bit sum: numbers 0 and 1, or 2 and 3, of every word of a block.
template <class V>
float largest_half_block(const float* x, int64_t d) {
  float largest = 0.0f, buffer[kBlockValues], lanes[V::kWidth];
  for (int64_t first = 0; first < d; first += kBlockValues) {
    const float* u = block_of(x, first, d, buffer);
    auto sum = V::zero();
    for (int64_t i = 0; i < kBlockValues; i += V::kWidth) sum = V::fma(V::load(u + i), V::load(u + i), sum);
    V::store(lanes, sum);
    float low = 0.0f, high = 0.0f;
    for (int i = 0; i < V::kWidth; i += 4) low += lanes[i] + lanes[i + 1], high += lanes[i + 2] + lanes[i + 3];
    largest = low > largest ? low : largest;
    largest = high > largest ? high : largest;
  }
  return largest;
}

// Minus the sums of the right numbers that share a 16-bit sum: at most sqrt(32) kRightLength, so they fit in 16 bits.
inline uint32_t start_of_block(const int32_t* q) {
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < kBlockValues; i += 4) low += q[i] + q[i + 1], high += q[i + 2] + q[i + 3];
  return (static_cast<uint32_t>(-low) & 0xffffu) | static_cast<uint32_t>(-high) << 16;
}

template <class V, bool Left>
void quantize_bytes(const float* x, int64_t d, int64_t words, bool rounded, uint32_t* out, RowStats* stats) {
  const float squares = sum_of_squares<V>(x, d), norm = __builtin_sqrtf(squares), top = largest_magnitude<V>(x, d);
  const float longest = __builtin_sqrtf(largest_half_block<V>(x, d)) * kUp;
  const float room = (Left ? kLeftLength : kRightLength) - kLengthRounding, limit = Left ? kLeftTop : kRightTop;
  float scale = norm > 0.0f ? limit / top : 0.0f;
  if (scale * longest > room) scale = room / longest;
  const float inv = scale > 0.0f ? 1.0f / scale : 0.0f;
  const auto vscale = V::set1(scale), vinv = V::set1(inv);
  auto rest = V::zero(), rounded_squares = V::zero();
  float buffer[kBlockValues];
  int32_t q[kBlockValues];
  uint8_t bytes[kBlockValues];
  uint32_t* const end = out + words;
  for (int64_t first = 0; out < end; first += kBlockValues) {
    const float* u = block_of(x, first, d, buffer);
    for (int64_t i = 0; i < kBlockValues; i += V::kWidth) {
      const auto value = V::load(u + i);
      const auto n = V::round_to_int(V::mul(value, vscale));
      const auto back = V::mul(V::to_float(n), vinv), gap = V::sub(value, back);
      rest = V::fma(gap, gap, rest);
      rounded_squares = V::fma(back, back, rounded_squares);
      V::istore(q + i, n);
    }
    for (int64_t i = 0; i < kBlockValues; ++i) bytes[i] = static_cast<uint8_t>(Left ? q[i] + kOffset : q[i]);
    *out++ = Left ? 0u : start_of_block(q);
    const int64_t data = end - out < kBlockWords ? end - out : kBlockWords;
    __builtin_memcpy(out, bytes, 4 * static_cast<uint64_t>(data));
    out += data;
  }
  *stats = {inv, 0.5f * (rounded ? V::sum(rounded_squares) : squares), norm * kUp + kTiny,
            __builtin_sqrtf(V::sum(rest)) * kUp + 1e-7f * norm};
}

// MR x (NV * width) products over one block; 16-bit sums go to 32 bits in `out` at its end.
template <class V, int MR, int NV>
inline void block_of_products(const uint32_t* left, const uint32_t* right, int64_t words, int32_t* out, int64_t ld,
                              bool accumulate) {
  constexpr int W = V::kWidth;
  typename V::I acc[MR][NV];
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) {
    const auto start = V::iload(reinterpret_cast<const int32_t*>(right) + c * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][c] = V::start_quads(start);
  }
  for (int64_t p = 1; p < words; ++p) {
    typename V::I b[NV];
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) b[c] = V::iload(reinterpret_cast<const int32_t*>(right) + (p * NV + c) * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const auto a = V::ibroadcast(left + p * MR + r);
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) acc[r][c] = V::dot_quads(acc[r][c], a, b[c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) {
      int32_t* corner = out + r * ld + c * W;
      V::istore(corner, V::end_quads(accumulate ? V::iload(corner) : V::izero(), acc[r][c]));
    }
}

template <class V, int MR, int NV>
void multiply_bytes(const uint32_t* left, const uint32_t* right, int64_t left_panels, int64_t right_panels,
                    int64_t words, void* out, int64_t ld) {
  constexpr int NR = NV * V::kWidth;
  constexpr int64_t kStep = kBlockWords + 1, kPass = kBlocksPerPass * kStep;
  auto* c = static_cast<int32_t*>(out);
  for (int64_t j = 0; j < right_panels; ++j)
    for (int64_t first = 0; first < words; first += kPass) {
      const int64_t last = words - first < kPass ? words : first + kPass;
      for (int64_t i = 0; i < left_panels; ++i)
        for (int64_t p = first; p < last; p += kStep)
          block_of_products<V, MR, NV>(left + (i * words + p) * MR, right + (j * words + p) * NR,
                                       last - p < kStep ? last - p : kStep, c + i * MR * ld + j * NR, ld, p > 0);
    }
}

template <class V, int MR, int NV>
constexpr ScreenKernels byte_kernels(const char* name, int64_t left_rows) {
  ScreenKernels kernels = integer_kernels<V, MR, NV>(name, left_rows);
  kernels.words = &words_of_bytes;
  kernels.quantize_left = &quantize_bytes<V, true>;
  kernels.quantize_right = &quantize_bytes<V, false>;
  kernels.multiply = &multiply_bytes<V, MR, NV>;
  return kernels;
}

}  // namespace
}  // namespace planmill
