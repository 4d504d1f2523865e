// Softmax attention of a tile of queries over all keys, for several maps of scores whose weights are summed.
#pragma once

#include <cstdint>

namespace planmill {

constexpr int64_t kPanel = 64;              // keys, and columns of values, that lie together
constexpr int64_t kCorrelationRows = 24;    // queries of a tile
constexpr int64_t kCorrelationMaps = 6;     // most maps of one sum
constexpr int64_t kCorrelationTerms = 3;    // most products that are added to one map

// Scores += queries keys^T: queries [rows, width], scaled; keys [panels][width][kPanel], zero past the last.
struct CorrelationTerm {
  const float* queries;
  const float* keys;
  int64_t width;
};

struct CorrelationMap {
  CorrelationTerm terms[kCorrelationTerms];
  int64_t count;
};

// out [rows, value_width rounded up to kPanel] = (sum over maps of the softmax of its scores) values. Scores below
// `threshold` weigh nothing where `limited`; a row that has no other then takes its own value, number `first` + row.
struct CorrelationTile {
  int64_t rows, keys;
  CorrelationMap maps[kCorrelationMaps];
  int64_t count;
  const float* values;  // [ceil(value_width / kPanel)][panels * kPanel][kPanel], zero past the last key
  int64_t value_width;
  float* out;
  bool limited;
  float threshold;
  int64_t first;
};

struct CorrelationKernels {
  // scratch: panels * rows * kPanel floats, twice that for more than one map.
  void (*attend)(const CorrelationTile& tile, float* scratch);
};

const CorrelationKernels* correlation_baseline();
const CorrelationKernels* correlation_avx2();
const CorrelationKernels* correlation_avx512();

}  // namespace planmill
