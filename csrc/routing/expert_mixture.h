// Block arithmetic of expert_mixture: products of packed expert weights, and what stands between them.
#pragma once

#include <cstdint>

namespace planmill {

enum class Storage : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// Inner products are summed over blocks of at most this many channels, then over the blocks: the same order whatever
// else is in the batch. Rows of a block of x stand this far apart.
constexpr int64_t kChannelBlock = 256;

struct alignas(64) TileState {
  unsigned char bytes[64];
};

// Tile registers, for weights in bfloat16; null where there are none. Rows of x are rounded to bfloat16.
struct TileKernels {
  void (*start)(TileState* before) = nullptr;
  void (*stop)(const TileState* before) = nullptr;
  // Rows of x in the order of the tiles, 32 rows and 32 channels at a time, padded with zeros. These k channels are the
  // steps of 32 from `step` on, of `steps` altogether.
  void (*arrange)(const float* x, int64_t stride, int64_t rows, int64_t k, int64_t step, int64_t steps,
                  uint32_t* out) = nullptr;
  // z[i][r] = sum_c x[i][c] w[r][c] for `columns` rows of w, at most panel_width, added to z unless `first`; whole
  // tiles of 16 are written. `next`: the full panel that comes next, brought to the cache meanwhile; null: none.
  void (*multiply)(const void* w, int64_t ld, int64_t columns, const uint32_t* x, int64_t rows, int64_t k, float* z,
                   int64_t ldz, bool first, const char* next) = nullptr;
};

struct ExpertMixtureKernels {
  int64_t panel_width;  // rows of a weight matrix that are packed together; results of `multiply` per row of x
  int64_t stream_rows;  // rows of x up to which `stream` is faster than `pack` and `multiply`
  // panel[c][r] = w[r][c] for `rows` rows (at most panel_width; the rest is zero) and k channels, w in storage type with
  // rows ld numbers apart
  void (*pack)(const void* w, Storage storage, int64_t ld, int64_t rows, int64_t k, float* panel);
  // z[i][r] = sum_c x[i][c] panel[c][r], added to z unless `first`; rows of x stand kChannelBlock apart. Meanwhile the
  // block that is packed next is brought to the second cache: panel_width rows of next_bytes each; null: none.
  void (*multiply)(const float* x, int64_t rows, const float* panel, int64_t k, float* z, int64_t ldz, bool first,
                   const char* next, int64_t next_stride, int64_t next_bytes);
  // The same, with the same bits, from the weights themselves: a full panel, for few rows of x.
  void (*stream)(const void* w, Storage storage, int64_t ld, int64_t k, const float* x, int64_t rows, float* z, int64_t ldz,
                 bool first, const void* next);
  // out = scale * x, x in storage type
  void (*load_row)(const void* x, Storage storage, int64_t n, float scale, float* out);
  // out = act(gate + gate_bias) * (up + up_bias); `up` null: plain; biases null: none. n is a multiple of panel_width.
  void (*activate)(Activation kind, const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                   int64_t n, float* out);
  // out += scale * row
  void (*accumulate)(const float* row, float scale, int64_t n, float* out);
  TileKernels tiles = {};
};

const ExpertMixtureKernels* expert_mixture_baseline();
const ExpertMixtureKernels* expert_mixture_avx2();
const ExpertMixtureKernels* expert_mixture_avx512();
const ExpertMixtureKernels* expert_mixture_amx();

}  // namespace planmill
