// Blocked local attention: one block of one head at a time.
#pragma once

#include <cstdint>

namespace planmill {

// Channels of an image in float32: element (c, y, x) is data[c * channel + y * row + x * column].
struct HaloPlanes {
  const float* data;
  int64_t channel, row, column;
};

struct HaloShape {
  int64_t d, dv, height, width;         // channels of q and k, of v; size of k
  int64_t block, halo, stride;          // in pixels of k
  float scale;
  bool masked, scale_positions;         // keys outside the image do not count; positional terms are scaled
  const float *rel_h, *rel_w;           // [2 win - 1, d], contiguous

  int64_t window() const { return block + 2 * halo; }
  int64_t queries() const { return block / stride; }  // along one side
};

// One head of one image; y has `channel`, `row` of a contiguous [dv, height / stride, width / stride].
struct HaloHead {
  HaloPlanes q, k, v;
  float* y;
};

struct HaloKernels {
  int64_t slab;  // queries of a tile
  // Block (p, r) of a head; scratch: halo_scratch floats.
  void (*attend)(const HaloShape& shape, const HaloHead& head, int64_t p, int64_t r, float* scratch);
};

// Floats that `attend` works in: keys and values of a window, and of a tile its queries, positional terms, weights and result.
inline int64_t halo_scratch(const HaloShape& s, int64_t slab) {
  const int64_t win = s.window(), keys = win * win;
  return keys * (s.d + s.dv) + slab * (s.d + 3 * win + s.queries() + keys + s.dv);
}

const HaloKernels* halo_attention_baseline();
const HaloKernels* halo_attention_avx2();
const HaloKernels* halo_attention_avx512();

}  // namespace planmill
