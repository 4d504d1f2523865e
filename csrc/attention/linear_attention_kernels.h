// The kernels behind LinearAttentionKernels, written once over a vector type of common/vec.h.
//
// 48 tokens at a time: four register tiles of rows in AVX-512 and eight in the others, and three blocks of 48 rows of 64
// numbers lie in the first-level cache beside one another.
#pragma once

#include "attention/linear_attention.h"
#include "common/element_rows.h"
#include "common/products.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace planmill {
namespace {

constexpr int64_t kTile = 48;

template <class V>
int64_t padded(int64_t n) {
  return (n + V::kWidth - 1) / V::kWidth * V::kWidth;
}

template <class V, FeatureMap Map>
typename V::F feature(typename V::F x) {  // NaN stays
  if constexpr (Map == FeatureMap::kElu) {
    return V::where_positive(x, V::add(x, V::set1(1.0f)), exp_below_or_nan<V>(V::min(V::zero(), x)));
  } else if constexpr (Map == FeatureMap::kIdentity) {
    return x;
  } else {
    const auto positive = relu<V>(x);
    return Map == FeatureMap::kRelu ? positive : V::mul(positive, positive);
  }
}

// Rows that are read one tile later: in a token that holds many heads, each lies in a page of its own, which no processor
// foresees.
inline void fetch_ahead(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// y [rows, padded width] = phi(x), zero in padding and where the mask is.
template <class V, class T, FeatureMap Map>
void load_features(const void* x, int64_t ldx, const uint8_t* mask, int64_t rows, int64_t width, float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r, y += ldy) {
    const auto* row = static_cast<const typename T::Stored*>(x) + r * ldx;
    fetch_ahead(row + kTile * ldx, width * static_cast<int64_t>(sizeof(*row)));
    if (mask != nullptr && mask[r] == 0) {
      for (int64_t i = 0; i < ldy; i += V::kWidth) V::store(y + i, V::zero());
      continue;
    }
    int64_t i = 0;
    for (; i + V::kWidth <= width; i += V::kWidth) V::store(y + i, feature<V, Map>(load_row<V, T>(row + i)));
    if (i == width) continue;
    float rest[V::kWidth];
    for (int64_t j = 0; j < V::kWidth; ++j) rest[j] = i + j < width ? T::read(row[i + j]) : 0.0f;
    V::store(y + i, feature<V, Map>(V::load(rest)));
    for (int64_t j = width; j < ldy; ++j) y[j] = 0.0f;
  }
}

template <class V, class T>
void load_of(FeatureMap map, const void* x, int64_t ldx, const uint8_t* mask, int64_t rows, int64_t width, float* y,
             int64_t ldy) {
  if (map == FeatureMap::kElu) load_features<V, T, FeatureMap::kElu>(x, ldx, mask, rows, width, y, ldy);
  else if (map == FeatureMap::kRelu) load_features<V, T, FeatureMap::kRelu>(x, ldx, mask, rows, width, y, ldy);
  else if (map == FeatureMap::kIdentity) load_features<V, T, FeatureMap::kIdentity>(x, ldx, mask, rows, width, y, ldy);
  else load_features<V, T, FeatureMap::kSquaredRelu>(x, ldx, mask, rows, width, y, ldy);
}

template <class V, class T>
void store_of(const float* y, int64_t n, float factor, void* out) {
  auto* row = static_cast<typename T::Stored*>(out);
  const auto by = V::set1(factor);
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) store_row<V, T>(row + i, V::mul(by, V::load(y + i)));
  for (; i < n; ++i) row[i] = T::round(factor * y[i]);
}

template <class V>
struct LinearTile {
  const LinearHead& head;
  const int64_t ldk = padded<V>(head.width), ldv = padded<V>(head.values);
  float* features;    // [kTile, ldk] of keys
  float* queries;     // [kTile, ldk]
  float* values;      // [kTile, ldv]
  float* results;     // [kTile, ldv]
  float* scores;      // [kTile, kTile]
  float* transposed;  // [D, kTile]
  float* local;       // a state
  float* joined;      // a state

  LinearTile(const LinearHead& of, float* scratch) : head(of) {
    const auto take = [&](int64_t n) {
      float* here = scratch;
      scratch += n;
      return here;
    };
    features = take(kTile * ldk), queries = take(kTile * ldk), values = take(kTile * ldv), results = take(kTile * ldv);
    scores = take(kTile * kTile), transposed = take(head.width * kTile);
    local = take(state(head.width, head.values)), joined = take(state(head.width, head.values));
  }

  static int64_t state(int64_t width, int64_t values) { return width * padded<V>(values) + padded<V>(width); }

  static int64_t scratch(int64_t width, int64_t values) {
    const int64_t rows = 2 * padded<V>(width) + 2 * padded<V>(values) + kTile + width;
    return kTile * rows + 2 * state(width, values);
  }

  float* totals(float* state) const { return state + head.width * ldv; }  // z

  void load(FeatureMap map, const void* x, int64_t row, const uint8_t* mask, int64_t first, int64_t rows, int64_t width,
            float* y, int64_t ldy) const {
    const void* at = static_cast<const char*>(x) + first * row * bytes_of(head.type);
    mask = mask == nullptr ? nullptr : mask + first;
    if (head.type == Element::kFloat) load_of<V, Float32>(map, at, row, mask, rows, width, y, ldy);
    else if (head.type == Element::kBFloat16) load_of<V, BFloat16>(map, at, row, mask, rows, width, y, ldy);
    else load_of<V, Half>(map, at, row, mask, rows, width, y, ldy);
  }

  void load_queries(int64_t first, int64_t rows) const {
    load(head.map, head.q, head.q_row, nullptr, first, rows, head.width, queries, ldk);
  }

  // The features of keys, and their values: where they lie if they can be read there.
  Strided load_keys(int64_t first, int64_t rows) const {
    load(head.map, head.k, head.k_row, head.mask, first, rows, head.width, features, ldk);
    if (head.type == Element::kFloat && head.mask == nullptr && head.values == ldv) {
      const float* v = static_cast<const float*>(head.v) + first * head.v_row;
      for (int64_t r = 0; r < rows; ++r) fetch_ahead(v + (kTile + r) * head.v_row, head.values * 4);
      return {v, head.v_row, 1};
    }
    load(FeatureMap::kIdentity, head.v, head.v_row, head.mask, first, rows, head.values, values, ldv);
    return {values, ldv, 1};
  }

  void add_to(float* state, Strided v, int64_t rows) const {
    multiply<V>({features, 1, ldk}, v.data, v.row, state, ldv, head.width, rows, ldv, true);
    float* z = totals(state);
    for (int64_t i = 0; i < ldk; i += V::kWidth) {
      auto sum = V::load(z + i);
      for (int64_t r = 0; r < rows; ++r) sum = V::add(sum, V::load(features + r * ldk + i));
      V::store(z + i, sum);
    }
  }

  float dot(const float* x, const float* y, int64_t n) const {
    auto sum = V::zero();
    for (int64_t i = 0; i < n; i += V::kWidth) sum = V::fma(V::load(x + i), V::load(y + i), sum);
    return V::sum(sum);
  }

  void finish(int64_t row, const float* result, float weight) const {
    const float factor = head.normalize ? head.scale / (head.scale * weight + head.eps) : head.scale;
    void* out = static_cast<char*>(head.out) + row * head.values * bytes_of(head.type);
    if (head.type == Element::kFloat) store_of<V, Float32>(result, head.values, factor, out);
    else if (head.type == Element::kBFloat16) store_of<V, BFloat16>(result, head.values, factor, out);
    else store_of<V, Half>(result, head.values, factor, out);
  }

  // queries times M, and phi(q) . z of a row
  void multiply_state(const float* state, int64_t rows) const {
    multiply<V>({queries, ldk, 1}, state, ldv, results, ldv, rows, head.width, ldv, false);
  }
  float weight(int64_t row, const float* state) const {
    return head.normalize ? dot(queries + row * ldk, state + head.width * ldv, ldk) : 0.0f;
  }

  bool finite(Strided v, int64_t rows) const {
    auto sum = V::zero();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < ldv; i += V::kWidth) sum = V::fma(V::load(v.data + r * v.row + i), V::zero(), sum);
    return V::sum(sum) == 0.0f;
  }

  // The scores of queries and keys of one tile, those of later keys zero; results += scores values.
  void add_scores(Strided v, int64_t rows) const {
    transpose(features, ldk, rows, head.width, transposed, kTile, kTile);
    multiply<V>({queries, ldk, 1}, transposed, kTile, scores, kTile, rows, head.width, kTile, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t m = r + 1; m < kTile; ++m) scores[r * kTile + m] = 0.0f;
    if (finite(v, rows)) {
      multiply<V>({scores, kTile, 1}, v.data, v.row, results, ldv, rows, rows, ldv, true);
      return;
    }
    for (int64_t r = 0; r < rows; ++r)  // zero times NaN is NaN: no row may read a later value
      multiply<V>({scores + r * kTile, kTile, 1}, v.data, v.row, results + r * ldv, ldv, 1, r + 1, ldv, true);
  }

  float sum_of_scores(int64_t row) const {
    auto sum = V::zero();
    for (int64_t m = 0; m < kTile; m += V::kWidth) sum = V::add(sum, V::load(scores + row * kTile + m));
    return V::sum(sum);
  }
};

template <class V>
void add_states(float* total, const float* part, int64_t n) {
  for (int64_t i = 0; i < n; i += V::kWidth) V::store(total + i, V::add(V::load(total + i), V::load(part + i)));
}

template <class V>
void add_keys(const LinearHead& head, int64_t first, int64_t last, float* state, float* scratch) {
  const LinearTile<V> tile(head, scratch);
  for (int64_t n = first; n < last; n += kTile) {
    const int64_t rows = last - n < kTile ? last - n : kTile;
    tile.add_to(state, tile.load_keys(n, rows), rows);
  }
}

template <class V>
void apply_state(const LinearHead& head, int64_t first, int64_t last, const float* state, float* scratch) {
  const LinearTile<V> tile(head, scratch);
  for (int64_t n = first; n < last; n += kTile) {
    const int64_t rows = last - n < kTile ? last - n : kTile;
    tile.load_queries(n, rows);
    tile.multiply_state(state, rows);
    for (int64_t r = 0; r < rows; ++r) tile.finish(n + r, tile.results + r * tile.ldv, tile.weight(r, state));
  }
}

template <class V>
void causal_tiles(const LinearHead& head, int64_t first, int64_t last, float* state, float* scratch) {
  const LinearTile<V> tile(head, scratch);
  const int64_t size = tile.state(head.width, head.values);
  for (int64_t i = 0; i < size; i += V::kWidth) V::store(tile.local + i, V::zero());
  for (int64_t n = first; n < last; n += kTile) {
    const int64_t rows = last - n < kTile ? last - n : kTile;
    for (int64_t i = 0; i < size; i += V::kWidth)
      V::store(tile.joined + i, V::add(V::load(state + i), V::load(tile.local + i)));
    tile.load_queries(n, rows);
    const Strided v = tile.load_keys(n, rows);
    tile.multiply_state(tile.joined, rows);
    tile.add_scores(v, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const float weight = tile.weight(r, tile.joined) + tile.sum_of_scores(r);
      tile.finish(n + r, tile.results + r * tile.ldv, weight);
    }
    tile.add_to(tile.local, v, rows);
  }
  add_states<V>(state, tile.local, size);
}

template <class V>
constexpr LinearAttentionKernels linear_attention_kernels() {
  return {&LinearTile<V>::state, &LinearTile<V>::scratch, &add_keys<V>, &apply_state<V>, &causal_tiles<V>, &add_states<V>};
}

}  // namespace
}  // namespace planmill
