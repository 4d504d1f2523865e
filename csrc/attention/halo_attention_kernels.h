// The kernels behind HaloKernels, written once over a vector type of common/vec.h.
//
// Scores stand as [keys, queries]: maxima and sums over keys are then lane by lane, and so is the result [dv, queries], whose
// rows are rows of the image. Keys outside the image have no row: of them only the positional term counts.
#pragma once

#include "attention/halo_attention.h"
#include "common/products.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace planmill {
namespace {

// The window of a block: rows [top, bottom) and columns [left, right) of it lie inside the image.
struct HaloWindow {
  int64_t size, y, x, top, bottom, left, right;  // (y, x): where it begins, in the image

  HaloWindow(const HaloShape& s, int64_t p, int64_t r)
      : size(s.window()), y(p * s.block - s.halo), x(r * s.block - s.halo) {
    top = y < 0 ? -y : 0;
    left = x < 0 ? -x : 0;
    bottom = s.height - y < size ? s.height - y : size;
    right = s.width - x < size ? s.width - x : size;
  }
  int64_t keys() const { return (bottom - top) * (right - left); }
};

// The keys of a window that lie inside the image, [channels, keys] or, where channels are adjacent, [keys, channels].
struct PackedKeys {
  const float* data;
  int64_t channel, key;
};

inline PackedKeys pack_window(const HaloPlanes& x, int64_t channels, const HaloWindow& w, float* to) {
  const float* corner = x.data + (w.y + w.top) * x.row + (w.x + w.left) * x.column;
  const int64_t rows = w.bottom - w.top, columns = w.right - w.left, keys = w.keys();
  if (x.channel == 1) {
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t i = 0; i < columns; ++i) {
        const float* from = corner + y * x.row + i * x.column;
        float* line = to + (y * columns + i) * channels;
        for (int64_t c = 0; c < channels; ++c) line[c] = from[c];
      }
    return {to, 1, channels};
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t y = 0; y < rows; ++y) {
      const float* from = corner + c * x.channel + y * x.row;
      float* line = to + c * keys + y * columns;
      if (x.column == 1)
        for (int64_t i = 0; i < columns; ++i) line[i] = from[i];
      else
        for (int64_t i = 0; i < columns; ++i) line[i] = from[i * x.column];
    }
  return {to, keys, 1};
}

// Queries [first, first + count) of a block, padded to n.
template <class V>
struct HaloTile {
  using F = typename V::F;
  static constexpr int64_t kSlab = 2 * V::kWidth;
  const HaloShape& shape;
  const HaloWindow& window;
  int64_t first, count, n;
  int64_t iy[kSlab], ix[kSlab];  // of each query, in its block
  float *q, *product, *by_row, *by_column, *weights, *y;  // [d, n], [win + queries - 1, n], [win, n] twice, [keys, n], [dv, n]

  HaloTile(const HaloShape& s, const HaloWindow& w, int64_t first, float* scratch) : shape(s), window(w), first(first) {
    const int64_t side = s.queries(), rest = side * side - first;
    count = rest < kSlab ? rest : kSlab;
    n = count > V::kWidth ? kSlab : V::kWidth;
    for (int64_t i = 0; i < count; ++i) iy[i] = (first + i) / side, ix[i] = (first + i) % side;
    q = scratch;
    product = q + s.d * n;
    by_row = product + (w.size + side - 1) * n;
    by_column = by_row + w.size * n;
    weights = by_column + w.size * n;
    y = weights + w.keys() * n;
  }

  void load(const HaloPlanes& from, int64_t p, int64_t r) {
    int64_t offset[kSlab];
    const int64_t side = shape.queries();
    for (int64_t i = 0; i < count; ++i) offset[i] = (p * side + iy[i]) * from.row + (r * side + ix[i]) * from.column;
    for (int64_t c = 0; c < shape.d; ++c) {
      const float* plane = from.data + c * from.channel;
      for (int64_t i = 0; i < count; ++i) q[c * n + i] = plane[offset[i]];
      for (int64_t i = count; i < n; ++i) q[c * n + i] = 0.0f;
    }
  }

  void scale_queries() {
    for (int64_t i = 0; i < shape.d * n; ++i) q[i] *= shape.scale;
  }

  // to [win, n]: row j of query i is <q_i, rel[j - at_i + win - 1]>
  void positions(const float* rel, const int64_t* at, float* to) {
    const int64_t side = shape.queries(), rows = window.size + side - 1;
    multiply<V>({rel + (window.size - side) * shape.d, shape.d, 1}, q, n, product, n, rows, shape.d, n, false);
    for (int64_t j = 0; j < window.size; ++j) {
      for (int64_t i = 0; i < count; ++i) to[j * n + i] = product[(j - at[i] + side - 1) * n + i];
      for (int64_t i = count; i < n; ++i) to[j * n + i] = 0.0f;
    }
  }

  void load_logits(const PackedKeys& keys) {
    if (shape.scale_positions) scale_queries();
    positions(shape.rel_h, iy, by_row);
    positions(shape.rel_w, ix, by_column);
    if (!shape.scale_positions) scale_queries();
    multiply<V>({keys.data, keys.key, keys.channel}, q, n, weights, n, window.keys(), shape.d, n, false);
  }

  // f(positional term) for a vector of queries and every key that counts outside the image
  template <class Function>
  void for_outside(int64_t v, const Function& f) const {
    if (shape.masked) return;
    for (int64_t j = 0; j < window.size; ++j) {
      const F row = V::load(by_row + j * n + v);
      const bool inside = j >= window.top && j < window.bottom;
      for (int64_t i = 0; i < (inside ? window.left : window.size); ++i) f(V::add(row, V::load(by_column + i * n + v)));
      for (int64_t i = window.right; inside && i < window.size; ++i) f(V::add(row, V::load(by_column + i * n + v)));
    }
  }

  // Logits of a vector of queries become e^(logit - max); gives 1 / their sum, NaN where a logit is NaN.
  F softmax(int64_t v) {
    F top = V::set1(-__builtin_inff());
    uint32_t numbers = ~0u;
    const auto see = [&](F logit) {
      top = V::max(logit, top);  // gives top where the logit is NaN
      numbers &= V::mask_ge(logit, logit);
    };
    float* at = weights + v;
    for (int64_t j = window.top; j < window.bottom; ++j) {
      const F row = V::load(by_row + j * n + v);
      for (int64_t i = window.left; i < window.right; ++i, at += n) {
        const F logit = V::add(V::load(at), V::add(row, V::load(by_column + i * n + v)));
        V::store(at, logit);
        see(logit);
      }
    }
    for_outside(v, see);
    F sum = V::zero();
    at = weights + v;
    for (int64_t j = 0; j < window.keys(); ++j, at += n) {
      const F weight = exp_below<V>(V::sub(V::load(at), top));
      V::store(at, weight);
      sum = V::add(sum, weight);
    }
    for_outside(v, [&](F logit) { sum = V::add(sum, exp_below<V>(V::sub(logit, top))); });
    const F share = V::div(V::set1(1.0f), sum);  // infinite where all logits are -inf, or one is inf: NaN follows
    constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t{1} << V::kWidth) - 1);
    if ((numbers & kAll) == kAll) return share;
    float shares[V::kWidth];
    V::store(shares, share);
    for (int i = 0; i < V::kWidth; ++i)
      if ((numbers >> i & 1) == 0) shares[i] = __builtin_nanf("");
    return V::load(shares);
  }

  void store(const PackedKeys& values, const HaloHead& head, int64_t p, int64_t r) {
    F share[2];
    for (int64_t v = 0; v < n; v += V::kWidth) share[v / V::kWidth] = softmax(v);
    multiply<V>({values.data, values.channel, values.key}, weights, n, y, n, shape.dv, window.keys(), n, false);
    const int64_t side = shape.queries(), height = shape.height / shape.stride, width = shape.width / shape.stride;
    int64_t offset[kSlab];
    for (int64_t i = 0; i < count; ++i) offset[i] = (p * side + iy[i]) * width + r * side + ix[i];
    for (int64_t c = 0; c < shape.dv; ++c) {
      float* line = y + c * n;
      for (int64_t v = 0; v < n; v += V::kWidth) V::store(line + v, V::mul(V::load(line + v), share[v / V::kWidth]));
      float* plane = head.y + c * height * width;
      for (int64_t i = 0; i < count; ++i) plane[offset[i]] = line[i];
    }
  }
};

template <class V>
void halo_block(const HaloShape& shape, const HaloHead& head, int64_t p, int64_t r, float* scratch) {
  const HaloWindow window(shape, p, r);
  const PackedKeys keys = pack_window(head.k, shape.d, window, scratch);
  const PackedKeys values = pack_window(head.v, shape.dv, window, scratch + window.keys() * shape.d);
  float* rest = scratch + window.keys() * (shape.d + shape.dv);
  const int64_t queries = shape.queries() * shape.queries();
  for (int64_t first = 0; first < queries; first += HaloTile<V>::kSlab) {
    HaloTile<V> tile(shape, window, first, rest);
    tile.load(head.q, p, r);
    tile.load_logits(keys);
    tile.store(values, head, p, r);
  }
}

template <class V>
constexpr HaloKernels halo_kernels() {
  return {HaloTile<V>::kSlab, &halo_block<V>};
}

}  // namespace
}  // namespace planmill
