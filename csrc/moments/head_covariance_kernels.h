// The kernels behind HeadCovarianceKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/products.h"
#include "moments/head_covariance.h"

namespace planmill {
namespace {

// Sum of (x - centre)^power over a row, power 1 or 2.
template <class V, bool Squared>
float sum_row(const float* x, int64_t d, float centre) {
  constexpr int kChains = 4;  // additions that do not wait for each other
  typename V::F sums[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  const auto middle = V::set1(centre);
  const auto add = [&](int64_t c, typename V::F sum) {
    const auto z = V::sub(V::load(x + c), middle);
    return Squared ? V::fma(z, z, sum) : V::add(sum, z);
  };
  int64_t c = 0;
  for (; c + kChains * V::kWidth <= d; c += kChains * V::kWidth)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) sums[k] = add(c + k * V::kWidth, sums[k]);
  for (; c + V::kWidth <= d; c += V::kWidth) sums[0] = add(c, sums[0]);
  float rest = 0.0f;
  for (; c < d; ++c) rest += Squared ? (x[c] - centre) * (x[c] - centre) : x[c] - centre;
  return V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3]))) + rest;
}

template <class V>
void normalise_rows(const float* x, int64_t step, int64_t count, int64_t d, const float* weight, const float* bias,
                    float eps, float* out, int64_t stride) {
  constexpr int64_t kAhead = 6;
  const auto share = 1.0f / static_cast<float>(d);
  for (int64_t n = 0; n < count; ++n, x += step, out += stride) {
    int64_t c = 0;
    // Rows of other heads lie between those of this one, where the processor's own prefetching loses the trail.
    for (int64_t ahead = 0; ahead < d; ahead += 16) __builtin_prefetch(x + kAhead * step + ahead);
    if (weight == nullptr) {
      for (; c < d; ++c) out[c] = x[c];
    } else {
      // The mean about the row's first number, so that a row far from zero keeps its digits.
      const float mean = x[0] + sum_row<V, false>(x, d, x[0]) * share;
      const float inverse = 1.0f / __builtin_sqrtf(sum_row<V, true>(x, d, mean) * share + eps);
      const auto middle = V::set1(mean), factor = V::set1(inverse);
      for (; c + V::kWidth <= d; c += V::kWidth) {
        const auto z = V::mul(V::sub(V::load(x + c), middle), factor);
        V::store(out + c, V::fma(z, V::load(weight + c), V::load(bias + c)));
      }
      for (; c < d; ++c) out[c] = (x[c] - mean) * inverse * weight[c] + bias[c];
    }
    for (; c < stride; ++c) out[c] = 0.0f;
  }
}

template <class V>
void sum_rows(float* rows, int64_t count, int64_t stride, int64_t padded, const float* origin, bool subtract, float* sums) {
  for (int64_t c = 0; c < padded; c += V::kWidth) {
    const auto from = V::load(origin + c);
    auto sum = V::zero();
    float* row = rows + c;
    for (int64_t n = 0; n < count; ++n, row += stride) {
      const auto z = V::sub(V::load(row), from);
      if (subtract) V::store(row, z);
      sum = V::add(sum, z);
    }
    V::store(sums + c, sum);
  }
}

template <class V>
void multiply_heads(const float* a, const float* b, int64_t count, int64_t stride, int64_t first, int64_t rows,
                    int64_t padded, float* c, bool add) {
  const Strided left{a + first, 1, stride};
  if (!add) {
    multiply<V>(left, b, stride, c, padded, rows, count, padded, false);
    return;
  }
  // Sums of one block of tokens before they are added: what is summed one after the other stays short.
  constexpr int64_t kColumns = 4 * V::kWidth;
  float block[kProductChunk * kColumns];
  for (int64_t j = 0; j < padded; j += kColumns) {
    const int64_t columns = padded - j < kColumns ? padded - j : kColumns;
    multiply<V>(left, b + j, stride, block, kColumns, rows, count, columns, false);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < columns; k += V::kWidth) {
        float* target = c + i * padded + j + k;
        V::store(target, V::add(V::load(target), V::load(block + i * kColumns + k)));
      }
  }
}

template <class V>
void finish_product(float* c, int64_t d, int64_t padded, float factor, const float* left_mean, const float* left_offset,
                    const float* right_offset, const float* right_rest, float* squares) {
  const auto scale = V::set1(factor);
  for (int64_t j = 0; j < padded; j += V::kWidth) V::store(squares + j, V::zero());
  for (int64_t i = 0; i < d; ++i, c += padded) {
    const auto mean = V::set1(left_mean == nullptr ? 0.0f : left_mean[i]);
    const auto offset = V::set1(left_mean == nullptr ? 0.0f : left_offset[i]);
    for (int64_t j = 0; j < padded; j += V::kWidth) {
      auto value = V::mul(scale, V::load(c + j));
      if (left_mean != nullptr) {
        value = V::fma(mean, V::load(right_offset + j), value);
        value = V::fma(offset, V::load(right_rest + j), value);
      }
      V::store(c + j, value);
      V::store(squares + j, V::fma(value, value, V::load(squares + j)));
    }
  }
}

template <class V>
void store_product(const float* c, int64_t d, int64_t padded, const float* scale, float* out) {
  for (int64_t i = 0; i < d; ++i, c += padded, out += d) {
    int64_t j = 0;
    for (; j + V::kWidth <= d; j += V::kWidth) V::store(out + j, V::mul(V::load(c + j), V::load(scale + j)));
    for (; j < d; ++j) out[j] = c[j] * scale[j];
  }
}

template <class V>
constexpr HeadCovarianceKernels head_covariance_kernels() {
  return {V::kWidth,          &normalise_rows<V>, &sum_rows<V>, &multiply_heads<V>,
          &finish_product<V>, &store_product<V>};
}

}  // namespace
}  // namespace planmill
