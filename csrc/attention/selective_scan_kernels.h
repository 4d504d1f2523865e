// The kernels behind ScanKernels, written once over a vector type of common/vec.h.
//
// Lanes are channels: the sum over states is then lane by lane, and any number of states fills the vectors. Rows of the
// sequence are brought into that order some positions at a time.
#pragma once

#include "attention/selective_scan.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace planmill {
namespace {

template <class V>
struct ChannelScan {
  using F = typename V::F;
  static constexpr int64_t kChannels = 2 * V::kWidth;
  const ScanBlock& block;
  float *rates, *h;                    // [states, kChannels]
  float *steps, *u, *gate, *y;         // [kScanPositions, kChannels]
  float *into, *out;                   // [kScanPositions, states]

  ChannelScan(const ScanBlock& b, float* scratch) : block(b) {
    const int64_t state = b.states * kChannels, row = kScanPositions * kChannels;
    rates = scratch, h = rates + state, steps = h + state, u = steps + row, gate = u + row, y = gate + row;
    into = y + row, out = into + kScanPositions * b.states;
    for (int64_t n = 0; n < b.states; ++n)
      for (int64_t c = 0; c < kChannels; ++c) {
        rates[n * kChannels + c] = c < b.channels ? b.rates[c * b.states + n] : 0.0f;
        h[n * kChannels + c] = 0.0f;
      }
  }

  // to [count, width]: positions [first, first + count) of `rows` rows, zeros beyond them
  static void bring(const ScanRows& from, int64_t rows, int64_t first, int64_t count, int64_t width, float* to) {
    if (from.row == 1) {
      for (int64_t t = 0; t < count; ++t) {
        const float* x = from.data + (first + t) * from.position;
        for (int64_t c = 0; c < rows; ++c) to[t * width + c] = x[c];
        for (int64_t c = rows; c < width; ++c) to[t * width + c] = 0.0f;
      }
      return;
    }
    for (int64_t c = 0; c < width; ++c)
      for (int64_t t = 0; t < count; ++t)
        to[t * width + c] = c < rows ? from.data[c * from.row + (first + t) * from.position] : 0.0f;
  }

  template <bool Decaying>
  static F decay(F x) {
    return Decaying ? exp_below_or_nan<V>(x) : exp<V>(x);
  }

  template <bool Decaying>
  void advance(int64_t t) {
    const F step[2] = {V::load(steps + t * kChannels), V::load(steps + t * kChannels + V::kWidth)};
    const F drive[2] = {V::mul(step[0], V::load(u + t * kChannels)),
                        V::mul(step[1], V::load(u + t * kChannels + V::kWidth))};
    F sum[2] = {V::zero(), V::zero()};
    for (int64_t n = 0; n < block.states; ++n) {
      const F b = V::set1(into[t * block.states + n]), c = V::set1(out[t * block.states + n]);
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = n * kChannels + i * V::kWidth;
        const F kept = decay<Decaying>(V::mul(step[i], V::load(rates + at)));
        const F state = V::fma(kept, V::load(h + at), V::mul(drive[i], b));
        V::store(h + at, state);
        sum[i] = V::fma(state, c, sum[i]);
      }
    }
    V::store(y + t * kChannels, sum[0]);
    V::store(y + t * kChannels + V::kWidth, sum[1]);
  }

  void finish(int64_t count) {
    if (block.skip != nullptr) {
      float skip[kChannels];
      for (int64_t c = 0; c < kChannels; ++c) skip[c] = c < block.channels ? block.skip[c] : 0.0f;
      for (int64_t i = 0; i < count * kChannels; i += V::kWidth)
        V::store(y + i, V::fma(V::load(skip + i % kChannels), V::load(u + i), V::load(y + i)));
    }
    if (block.gate.data != nullptr)
      for (int64_t i = 0; i < count * kChannels; i += V::kWidth)
        V::store(y + i, V::mul(V::load(y + i), silu<V>(V::load(gate + i))));
  }

  void run() {
    for (int64_t first = 0; first < block.length; first += kScanPositions) {
      const int64_t rest = block.length - first, count = rest < kScanPositions ? rest : kScanPositions;
      bring(block.u, block.channels, first, count, kChannels, u);
      bring(block.steps, block.channels, first, count, kChannels, steps);
      if (block.gate.data != nullptr) bring(block.gate, block.channels, first, count, kChannels, gate);
      bring(block.into, block.states, first, count, block.states, into);
      bring(block.out, block.states, first, count, block.states, out);
      for (int64_t t = 0; t < count; ++t) block.decaying ? advance<true>(t) : advance<false>(t);
      finish(count);
      for (int64_t c = 0; c < block.channels; ++c)
        for (int64_t t = 0; t < count; ++t) block.y[c * block.length + first + t] = y[t * kChannels + c];
    }
    for (int64_t c = 0; c < block.channels; ++c)
      for (int64_t n = 0; n < block.states; ++n) block.last[c * block.states + n] = h[n * kChannels + c];
  }
};

template <class V>
void scan_block(const ScanBlock& block, float* scratch) {
  ChannelScan<V>(block, scratch).run();
}

template <class V>
constexpr ScanKernels scan_kernels() {
  return {ChannelScan<V>::kChannels, &scan_block<V>};
}

}  // namespace
}  // namespace planmill
