// The kernels behind ClusterKernels, written once over a vector type of common/vec.h.
#pragma once

#include "attention/clusters.h"
#include "common/element_rows.h"
#include "common/products.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace planmill {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLargestLogit = 3.4028234664e38f;  // logits beyond count as this, and hidden ones as its negative
constexpr float kSelfLogit = -5.0e4f;
constexpr float kNormEpsilon = 1.0e-12f;
constexpr float kMeanEpsilon = 1.0e-5f;
constexpr int64_t kQueryRows = 96, kCausalRows = 24;  // queries of a tile: with fewer, more of the hidden keys are left out

template <class V>
constexpr int64_t padded_to(int64_t n) {
  return (n + V::kWidth - 1) / V::kWidth * V::kWidth;
}

// out [width] = factor * row, in float32
template <class V, class T>
void widen(const void* row, int64_t width, float factor, float* out) {
  const auto* from = static_cast<const typename T::Stored*>(row);
  const auto by = V::set1(factor);
  int64_t i = 0;
  for (; i + V::kWidth <= width; i += V::kWidth) V::store(out + i, V::mul(by, load_row<V, T>(from + i)));
  for (; i < width; ++i) out[i] = factor * T::read(from[i]);
}

template <class V>
void load_token(const HeadRows& x, int64_t token, float factor, float* out) {
  const char* row = static_cast<const char*>(x.data) + token * x.stride * bytes_of(x.type);
  if (x.type == Element::kFloat) widen<V, Float32>(row, x.width, factor, out);
  else if (x.type == Element::kBFloat16) widen<V, BFloat16>(row, x.width, factor, out);
  else widen<V, Half>(row, x.width, factor, out);
}

// Rows of a cluster lie anywhere: some of them are on their way while one is read.
constexpr int64_t kAhead = 8;

inline void fetch_token(const HeadRows& x, const int32_t* members, int64_t i, int64_t count) {
  if (i + kAhead >= count) return;
  const char* row = static_cast<const char*>(x.data) + members[i + kAhead] * x.stride * bytes_of(x.type);
  for (int64_t byte = 0; byte < x.width * bytes_of(x.type); byte += 64) __builtin_prefetch(row + byte);
}

// row / max(|row|, epsilon), in place; rows whose squares would leave the range are brought into it first.
template <class V>
void normalise(float* row, int64_t width) {
  const auto zero = V::zero();
  auto largest = zero, squares = zero;
  float tail = 0.0f, tail_squares = 0.0f;
  int64_t i = 0;
  for (; i + V::kWidth <= width; i += V::kWidth) {
    const auto x = V::load(row + i);
    largest = V::max(largest, V::max(x, V::sub(zero, x)));
    squares = V::fma(x, x, squares);
  }
  for (; i < width; ++i) {
    const float x = row[i] < 0.0f ? -row[i] : row[i];
    tail = x > tail ? x : tail;
    tail_squares += x * x;
  }
  const float most = V::max_lane(largest) > tail ? V::max_lane(largest) : tail;
  float sum = V::sum(squares) + tail_squares, range = 1.0f;
  if (most > 1.0e18f) {
    range = 0x1p-80f;
    sum = 0.0f;
    for (int64_t j = 0; j < width; ++j) sum += (row[j] * range) * (row[j] * range);
  }
  const float length = __builtin_sqrtf(sum);
  const float factor = range / (length < kNormEpsilon * range ? kNormEpsilon * range : length);  // a NaN length stays
  for (i = 0; i + V::kWidth <= width; i += V::kWidth) V::store(row + i, V::mul(V::set1(factor), V::load(row + i)));
  for (; i < width; ++i) row[i] *= factor;
}

template <class V>
void score_tokens(const HeadRows& x, int64_t first, int64_t tokens, const float* means, int64_t padded, float* unit,
                  float* scores) {
  for (int64_t t = 0; t < tokens; ++t) {
    load_token<V>(x, first + t, 1.0f, unit + t * x.width);
    normalise<V>(unit + t * x.width, x.width);
  }
  multiply<V>({unit, x.width, 1}, means, padded, scores, padded, tokens, x.width, padded, false);
  for (int64_t i = 0; i < tokens * padded; i += V::kWidth)
    V::store(scores + i, V::max(V::load(scores + i), V::set1(kMinusInfinity)));  // NaN gives max's second operand
}

template <class V>
int64_t above_thresholds(const float* scores, const float* thresholds, int64_t padded, int32_t* columns) {
  constexpr uint32_t kAll = V::kWidth == 32 ? ~0u : (1u << V::kWidth) - 1;
  int64_t found = 0;
  for (int64_t c = 0; c < padded; c += V::kWidth) {
    uint32_t mask = kAll & ~V::mask_ge(V::load(thresholds + c), V::load(scores + c));
    for (; mask != 0; mask &= mask - 1) columns[found++] = static_cast<int32_t>(c + __builtin_ctz(mask));
  }
  return found;
}

// Floats as integers of the same order, and back.
inline int64_t ordinal(float x) {
  const auto bits = __builtin_bit_cast(int32_t, x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float of_ordinal(int64_t n) {
  const auto bits = static_cast<int32_t>(n);
  return __builtin_bit_cast(float, bits ^ ((bits >> 31) & 0x7fffffff));
}

// By bisection: a count is a few comparisons of vectors, and no branch depends on a single score.
template <class V>
void keep_largest(float* scores, int32_t* tokens, int64_t count, int64_t wanted, float& floor) {
  const int64_t padded = padded_to<V>(count);
  for (int64_t i = count; i < padded; ++i) scores[i] = scores[0];
  auto top = V::load(scores), bottom = V::sub(V::zero(), top);
  for (int64_t i = V::kWidth; i < padded; i += V::kWidth) {
    top = V::max(top, V::load(scores + i));
    bottom = V::max(bottom, V::sub(V::zero(), V::load(scores + i)));
  }
  for (int64_t i = count; i < padded; ++i) scores[i] = kMinusInfinity;  // never counted: no trial is as low
  // `wanted` or more are at or above `low`, none at or above `high`
  int64_t low = ordinal(-V::max_lane(bottom)), high = ordinal(V::max_lane(top)) + 1;
  bool exact = false;
  while (high - low > 1 && !exact) {
    const int64_t middle = low + (high - low) / 2;
    const auto trial = V::set1(of_ordinal(middle));
    int64_t found = 0;
    for (int64_t i = 0; i < padded; i += V::kWidth) found += __builtin_popcount(V::mask_ge(V::load(scores + i), trial));
    (found >= wanted ? low : high) = middle;
    exact = found == wanted;
  }
  floor = of_ordinal(low);
  int32_t ties = static_cast<int32_t>(wanted);  // of those that equal the floor; what is above it goes first
  for (int64_t i = 0; i < count; ++i) ties -= static_cast<int32_t>(scores[i] > floor);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float score = scores[i];
    const int32_t tied = static_cast<int32_t>(score == floor) & static_cast<int32_t>(ties > 0);
    ties -= tied;
    scores[kept] = score;
    tokens[kept] = tokens[i];
    kept += static_cast<int32_t>(score > floor) | tied;
  }
}

// The operands of one cluster in scratch: keys in the columns, values in the rows, a tile of queries and their logits.
template <class V>
struct ClusterTile {
  const Cluster& c;
  int64_t all, columns, depth, ld, values;  // keys and memory, padded; width of q; row lengths
  float *keys, *value_rows, *queries, *logits, *hidden;

  ClusterTile(const Cluster& cluster, float* scratch)
      : c(cluster),
        all(c.memory + c.keys),
        columns(padded_to<V>(all)),
        depth(c.q.width),
        ld(columns + 16),
        values(padded_to<V>(c.v.width)),
        keys(scratch),
        value_rows(keys + depth * ld),
        queries(value_rows + all * values),
        logits(queries + kQueryRows * depth),
        hidden(logits + kQueryRows * ld) {}

  static int64_t size(const Cluster& c) {
    const ClusterTile tile(c, nullptr);
    return tile.depth * tile.ld + tile.all * tile.values + kQueryRows * (tile.depth + tile.ld) + tile.columns;
  }

  void gather() {
    constexpr int64_t kBlock = 16;
    for (int64_t j = 0; j < all; j += kBlock) {
      const int64_t count = all - j < kBlock ? all - j : kBlock;
      float* rows = queries;  // free until the queries come
      for (int64_t i = 0; i < count; ++i) {
        const int64_t key = j + i - c.memory;
        if (key < 0) {
          for (int64_t d = 0; d < depth; ++d) rows[i * depth + d] = c.memory_k[(j + i) * depth + d];
        } else {
          fetch_token(c.k, c.k_members, key, c.keys);
          load_token<V>(c.k, c.k_members[key], 1.0f, rows + i * depth);
          if (c.shared) normalise<V>(rows + i * depth, depth);
        }
      }
      transpose(rows, depth, count, depth, keys + j, ld, j + kBlock < all ? kBlock : columns - j);
    }
    for (int64_t j = 0; j < all; ++j) {
      float* row = value_rows + j * values;
      if (j < c.memory) {
        for (int64_t d = 0; d < c.v.width; ++d) row[d] = c.memory_v[j * c.v.width + d];
      } else {
        fetch_token(c.v, c.k_members, j - c.memory, c.keys);
        load_token<V>(c.v, c.k_members[j - c.memory], 1.0f, row);
      }
      for (int64_t d = c.v.width; d < values; ++d) row[d] = 0.0f;
    }
    for (int64_t j = 0; j < columns; ++j) {
      const bool masked = c.k_mask != nullptr && j >= c.memory && j < all && c.k_mask[c.k_members[j - c.memory]] == 0;
      hidden[j] = masked ? 1.0f : 0.0f;
    }
  }

  // Columns that query `i` may see, by order: memory and the keys up to its own index.
  int64_t limit(int64_t i) const {
    if (!c.causal) return all;
    int64_t low = 0, high = c.keys;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (c.k_members[middle] <= c.q_members[i]) low = middle + 1;
      else high = middle;
    }
    return c.memory + low;
  }

  // Row of logits -> weights that are not yet divided by their sum, which is returned; zero from `limit` to `end`. Where
  // nothing is seen (`unseen`) they are those of weigh_unseen.
  float weigh(int64_t query, float* row, int64_t limit, int64_t end, bool& unseen) const {
    const bool blind = c.q_mask != nullptr && c.q_mask[c.q_members[query]] == 0;
    const int64_t used = padded_to<V>(limit);
    for (int64_t j = limit; j < used; ++j) row[j] = kNaN;  // counts as absent
    if (blind)
      for (int64_t j = c.memory; j < limit; ++j) row[j] = -kLargestLogit;
    if (c.shared) {  // a token with itself stands above the masks
      for (int64_t j = c.memory; c.k_mask != nullptr && j < limit; ++j)
        if (hidden[j] > 0.0f) row[j] = -kLargestLogit;
      row[c.memory + query] = kSelfLogit;
    }
    const bool mask_keys = c.k_mask != nullptr && !c.shared;
    const auto lowest = V::set1(-kLargestLogit), largest = V::set1(kLargestLogit), absent = V::set1(kMinusInfinity);
    auto top = absent;
    for (int64_t j = 0; j < used; j += V::kWidth) {
      auto logit = V::min(largest, V::max(lowest, V::load(row + j)));  // NaN passes both
      logit = V::max(logit, absent);                                   // and not this
      if (mask_keys) logit = V::where_positive(V::load(hidden + j), lowest, logit);
      V::store(row + j, logit);
      top = V::max(top, logit);
    }
    const float highest = V::max_lane(top);
    unseen = !(highest > -kLargestLogit);
    if (unseen) return weigh_unseen(row, limit, blind);
    auto sum = V::zero();
    for (int64_t j = 0; j < used; j += V::kWidth) {
      const auto weight = exp_below<V>(V::sub(V::load(row + j), V::set1(highest)));
      V::store(row + j, weight);
      sum = V::add(sum, weight);
    }
    for (int64_t j = used; j < end; j += V::kWidth) V::store(row + j, V::zero());
    return V::sum(sum);
  }

  // Every logit is the lowest one, but for those that are NaN; the keys from `limit` on are hidden and count too.
  float weigh_unseen(float* row, int64_t limit, bool blind) const {
    float sum = static_cast<float>(all - limit);
    for (int64_t j = 0; j < limit; ++j) {
      const bool counts = row[j] > kMinusInfinity || hidden[j] > 0.0f || (blind && j >= c.memory);
      row[j] = counts ? 1.0f : 0.0f;
      sum += row[j];
    }
    for (int64_t j = limit; j < all; ++j) row[j] = 1.0f;
    return sum > 0.0f ? sum : kNaN;
  }

  // out [rows, values] of queries [first, first + rows)
  void attend(int64_t first, int64_t rows, float* out) {
    int64_t limits[kQueryRows], most = 0;
    for (int64_t i = 0; i < rows; ++i) {
      limits[i] = limit(first + i);
      most = limits[i] > most ? limits[i] : most;
      fetch_token(c.q, c.q_members, first + i, c.queries);
      load_token<V>(c.q, c.q_members[first + i], c.scale, queries + i * depth);
    }
    const int64_t end = padded_to<V>(most);
    multiply<V>({queries, depth, 1}, keys, ld, logits, ld, rows, depth, end, false);
    float sums[kQueryRows];
    bool unseen[kQueryRows];
    for (int64_t i = 0; i < rows; ++i) sums[i] = weigh(first + i, logits + i * ld, limits[i], end, unseen[i]);
    multiply<V>({logits, ld, 1}, value_rows, values, out, values, rows, most, values, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = out + i * values;
      if (unseen[i]) multiply<V>({logits + i * ld, ld, 1}, value_rows, values, row, values, 1, all, values, false);
      const auto share = V::set1(all == 0 ? 0.0f : 1.0f / sums[i]);
      for (int64_t d = 0; d < values; d += V::kWidth) V::store(row + d, V::mul(share, V::load(row + d)));
    }
  }
};

template <class V>
void attend_cluster(const Cluster& cluster, float* scratch, float* out) {
  ClusterTile<V> tile(cluster, scratch);
  tile.gather();
  const int64_t step = cluster.causal ? kCausalRows : kQueryRows;
  for (int64_t i = 0; i < cluster.queries; i += step)
    tile.attend(i, cluster.queries - i < step ? cluster.queries - i : step, out + i * tile.values);
}

template <class V>
int64_t attend_scratch(const Cluster& cluster) {
  return ClusterTile<V>::size(cluster);
}

template <class V, class T>
void combine_to(const float* const* rows, int64_t count, int64_t width, void* out) {
  auto* target = static_cast<typename T::Stored*>(out);
  const float factor = 1.0f / (static_cast<float>(count) + kMeanEpsilon);
  int64_t i = 0;
  for (; i + V::kWidth <= width; i += V::kWidth) {
    auto sum = V::zero();
    for (int64_t r = 0; r < count; ++r) sum = V::add(sum, V::load(rows[r] + i));
    store_row<V, T>(target + i, V::mul(V::set1(factor), sum));
  }
  for (; i < width; ++i) {
    float sum = 0.0f;
    for (int64_t r = 0; r < count; ++r) sum += rows[r][i];
    target[i] = T::round(factor * sum);
  }
}

template <class V>
void combine_rows(const float* const* rows, int64_t count, int64_t width, Element type, void* out) {
  if (type == Element::kFloat) combine_to<V, Float32>(rows, count, width, out);
  else if (type == Element::kBFloat16) combine_to<V, BFloat16>(rows, count, width, out);
  else combine_to<V, Half>(rows, count, width, out);
}

template <class V>
constexpr ClusterKernels cluster_kernels() {
  return {V::kWidth, &score_tokens<V>, &above_thresholds<V>, &keep_largest<V>,
          &attend_scratch<V>, &attend_cluster<V>, &combine_rows<V>};
}

}  // namespace
}  // namespace planmill
