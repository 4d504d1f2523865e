// The kernels behind GatedScanKernels, written once over a vector type of common/vec.h.
#pragma once

#include "attention/gated_scan.h"
#include "common/element_rows.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace planmill {
namespace {

constexpr int64_t kScanBlock = 32;  // tokens: their gates, keys and queries stay in the first-level cache

// Rows of the state that a tile keeps in registers, beside two vectors of columns
template <class V>
constexpr int kScanRows = V::kWidth >= 16 ? 8 : 4;

template <class V>
int64_t padded(int64_t n) {
  return (n + V::kWidth - 1) / V::kWidth * V::kWidth;
}

// y [rows, ldy] = columns [first, first + count) of some rows of x, as float32; the rest of each row, up to ldy, is zero.
template <class V, class T>
void gather_rows(GatedRows x, int64_t row, int64_t rows, int64_t first, int64_t count, float* y, int64_t ldy) {
  const auto* from = static_cast<const typename T::Stored*>(x.data) + row * x.row + first * x.column;
  for (int64_t r = 0; r < rows; ++r, from += x.row, y += ldy) {
    int64_t c = 0;
    if (x.column == 1)
      for (; c + V::kWidth <= count; c += V::kWidth) V::store(y + c, load_row<V, T>(from + c));
    for (; c < count; ++c) y[c] = T::read(from[c * x.column]);
    for (; c < ldy; ++c) y[c] = 0.0f;
  }
}

template <class V>
void gather(Element type, GatedRows x, int64_t row, int64_t rows, int64_t first, int64_t count, float* y, int64_t ldy) {
  if (type == Element::kFloat) gather_rows<V, Float32>(x, row, rows, first, count, y, ldy);
  else if (type == Element::kBFloat16) gather_rows<V, BFloat16>(x, row, rows, first, count, y, ldy);
  else gather_rows<V, Half>(x, row, rows, first, count, y, ldy);
}

template <class V, class T>
void scatter_rows(const float* x, int64_t ldx, int64_t rows, int64_t count, typename T::Stored* to, int64_t ldt) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, to += ldt) {
    int64_t c = 0;
    for (; c + V::kWidth <= count; c += V::kWidth) store_row<V, T>(to + c, V::load(x + c));
    for (; c < count; ++c) to[c] = T::round(x[c]);
  }
}

// Buffers of one block of tokens: gates, keys and queries [kScanBlock, keys], values and results [kScanBlock, columns];
// the state [keys, columns]; for two directions of a 16-bit result, the forward one [tokens, columns].
struct GatedScratch {
  int64_t keys, columns;  // both padded
  float *gates, *k, *q, *v, *o, *state, *forward;
};

template <class V>
GatedScratch gated_scratch(const GatedSequence& x, int64_t count, float* memory, int64_t* size) {
  GatedScratch s;
  s.keys = (padded<V>(x.keys) + kScanRows<V> - 1) / kScanRows<V> * kScanRows<V>;
  s.columns = padded<V>(count);
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    used += n;
    return memory == nullptr ? nullptr : memory + used - n;
  };
  s.gates = take(kScanBlock * s.keys);
  s.k = take(kScanBlock * s.keys);
  s.q = take(kScanBlock * s.keys);
  s.v = take(kScanBlock * s.columns);
  s.o = take(kScanBlock * s.columns);
  s.state = take(s.keys * s.columns);
  const bool kept = x.backward_gates.data != nullptr && x.type != Element::kFloat;
  s.forward = take(kept ? x.tokens * s.columns : 0);
  *size = used;
  return s;
}

// A tile of the state through the tokens of a block, in order of `step`: S = a S + k v, o += q S. The tile stays in
// registers; o goes through the cache once for every kScanRows keys.
template <class V, int Rows, int Vectors>
inline void scan_tile(const GatedScratch& x, int64_t key, int64_t column, int64_t tokens, int64_t step) {
  using F = typename V::F;
  F s[Rows][Vectors];
  float* state = x.state + key * x.columns + column;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) s[r][j] = V::load(state + r * x.columns + j * V::kWidth);
  const int64_t begin = step > 0 ? 0 : tokens - 1;
  const float *a = x.gates + begin * x.keys + key, *k = x.k + begin * x.keys + key, *q = x.q + begin * x.keys + key;
  const float* v = x.v + begin * x.columns + column;
  float* o = x.o + begin * x.columns + column;
  const int64_t keys = step * x.keys, columns = step * x.columns;
  for (int64_t t = 0; t < tokens; ++t, a += keys, k += keys, q += keys, v += columns, o += columns) {
    F value[Vectors], sum[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) value[j] = V::load(v + j * V::kWidth), sum[j] = V::load(o + j * V::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const F decay = V::set1(a[r]), weight = V::set1(k[r]), query = V::set1(q[r]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        s[r][j] = V::fma(decay, s[r][j], V::mul(weight, value[j]));
        sum[j] = V::fma(query, s[r][j], sum[j]);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) V::store(o + j * V::kWidth, sum[j]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) V::store(state + r * x.columns + j * V::kWidth, s[r][j]);
}

template <class V>
void scan_block(const GatedScratch& x, int64_t tokens, int64_t step) {
  int64_t column = 0;
  for (; column + 2 * V::kWidth <= x.columns; column += 2 * V::kWidth)
    for (int64_t key = 0; key < x.keys; key += kScanRows<V>) scan_tile<V, kScanRows<V>, 2>(x, key, column, tokens, step);
  if (column < x.columns)
    for (int64_t key = 0; key < x.keys; key += kScanRows<V>) scan_tile<V, kScanRows<V>, 1>(x, key, column, tokens, step);
}

template <class V>
void load_block(const GatedSequence& x, const GatedScratch& s, GatedRows gates, int64_t row, int64_t rows, int64_t first,
                int64_t count) {
  gather<V>(x.gate_type, gates, row, rows, 0, x.keys, s.gates, s.keys);
  gather<V>(x.type, x.k, row, rows, 0, x.keys, s.k, s.keys);
  gather<V>(x.type, x.q, row, rows, 0, x.keys, s.q, s.keys);
  gather<V>(x.type, x.v, row, rows, first, count, s.v, s.columns);
  const auto scale = V::set1(x.scale);
  for (int64_t i = 0; i < rows * s.keys; i += V::kWidth) {
    V::store(s.gates + i, exp<V>(V::load(s.gates + i)));
    V::store(s.q + i, V::mul(scale, V::load(s.q + i)));
  }
}

template <class V>
void store_block(const GatedSequence& x, const GatedScratch& s, int64_t row, int64_t rows, int64_t first, int64_t count) {
  const int64_t at = row * x.out_row + first;
  if (x.type == Element::kFloat) scatter_rows<V, Float32>(s.o, s.columns, rows, count, static_cast<float*>(x.out) + at, x.out_row);
  else if (x.type == Element::kBFloat16)
    scatter_rows<V, BFloat16>(s.o, s.columns, rows, count, static_cast<uint16_t*>(x.out) + at, x.out_row);
  else scatter_rows<V, Half>(s.o, s.columns, rows, count, static_cast<_Float16*>(x.out) + at, x.out_row);
}

template <class V>
void load_state(const GatedSequence& x, const GatedScratch& s, int64_t first, int64_t count) {
  const GatedRows initial{x.initial, x.values, 1};
  const int64_t rows = x.initial == nullptr ? 0 : x.keys;
  gather_rows<V, Float32>(initial, 0, rows, first, count, s.state, s.columns);
  for (int64_t i = rows * s.columns; i < s.keys * s.columns; ++i) s.state[i] = 0.0f;
}

// Where a block's results begin: zero, or for the backward direction, what the forward one left.
template <class V>
void begin_results(const GatedSequence& x, const GatedScratch& s, int64_t row, int64_t rows, int64_t first, int64_t count,
                   bool forward) {
  if (forward) {
    for (int64_t i = 0; i < rows * s.columns; i += V::kWidth) V::store(s.o + i, V::zero());
  } else if (s.forward != nullptr && x.type != Element::kFloat) {
    for (int64_t i = 0; i < rows * s.columns; i += V::kWidth) V::store(s.o + i, V::load(s.forward + row * s.columns + i));
  } else {
    gather_rows<V, Float32>(GatedRows{x.out, x.out_row, 1}, row, rows, first, count, s.o, s.columns);
  }
}

template <class V>
void gated_attend(const GatedSequence& x, int64_t first, int64_t count, float* memory) {
  int64_t size;
  const GatedScratch s = gated_scratch<V>(x, count, memory, &size);
  const int64_t blocks = (x.tokens + kScanBlock - 1) / kScanBlock;
  const bool both = x.backward_gates.data != nullptr;
  for (int direction = 0; direction < (both ? 2 : 1); ++direction) {
    const bool forward = direction == 0;
    load_state<V>(x, s, first, count);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = (forward ? i : blocks - 1 - i) * kScanBlock;
      const int64_t rows = x.tokens - row < kScanBlock ? x.tokens - row : kScanBlock;
      load_block<V>(x, s, forward ? x.gates : x.backward_gates, row, rows, first, count);
      begin_results<V>(x, s, row, rows, first, count, forward);
      scan_block<V>(s, rows, forward ? 1 : -1);
      if (both && forward && x.type != Element::kFloat) {
        for (int64_t j = 0; j < rows * s.columns; j += V::kWidth) V::store(s.forward + row * s.columns + j, V::load(s.o + j));
      } else {
        store_block<V>(x, s, row, rows, first, count);
      }
    }
  }
  if (x.final != nullptr) scatter_rows<V, Float32>(s.state, s.columns, x.keys, count, x.final + first, x.values);
}

template <class V>
int64_t gated_scratch_size(const GatedSequence& x, int64_t count) {
  int64_t size;
  gated_scratch<V>(x, count, nullptr, &size);
  return size;
}

template <class V>
constexpr GatedScanKernels gated_scan_kernels() {
  return {2 * V::kWidth, &gated_scratch_size<V>, &gated_attend<V>};
}

}  // namespace
}  // namespace planmill
