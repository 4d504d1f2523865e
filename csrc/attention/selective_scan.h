// Mamba's selective scan: some channels of one sample at a time.
#pragma once

#include <cstdint>

namespace planmill {

// Element (c, t) is data[c * row + t * position].
struct ScanRows {
  const float* data;
  int64_t row, position;
};

struct ScanBlock {
  int64_t channels, states, length;  // channels: at most ScanKernels::channels
  ScanRows u, steps, gate;           // [channels, length]; gate null: none
  ScanRows into, out;                // [states, length]: B and C of the group
  const float* rates;                // A [channels, states]
  const float* skip;                 // D [channels]; null: none
  bool decaying;                     // all steps are at least zero, all rates at most
  float* y;                          // [channels, length]
  float* last;                       // [channels, states]
};

constexpr int64_t kScanPositions = 32;  // that are brought into vectors of channels at a time

struct ScanKernels {
  int64_t channels;
  void (*scan)(const ScanBlock& block, float* scratch);  // scratch: scan_scratch floats
};

inline int64_t scan_scratch(int64_t states, int64_t channels) {
  return 2 * states * channels + kScanPositions * (4 * channels + 2 * states);
}

const ScanKernels* selective_scan_baseline();
const ScanKernels* selective_scan_avx2();
const ScanKernels* selective_scan_avx512();

}  // namespace planmill
