// AMX-bf16: 32 x 32 products in four tile registers, two left and two right tiles of 16 x 32 numbers per step.
// PLANMILL_EMULATE: tile registers as plain arrays, for tests on machines without AMX.
#ifndef PLANMILL_EMULATE
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
#define PLANMILL_AVX512
#endif
#include "neighbors/screen_kernels.h"

namespace planmill {
namespace {

inline float from_bf16(uint32_t bits) {
  const uint32_t word = bits << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

inline uint32_t to_bf16(float value) {  // nearest even; the values are finite
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  return (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}

// bf16: rows of length one. The float32 sum of D products errs by at most |x||y| D 2^-24, counted in `res`.
template <class V>
void quantize_bf16(const float* x, int64_t d, int64_t pairs, bool rounded, uint32_t* out, RowStats* stats) {
  const float squares = sum_of_squares<V>(x, d), norm = __builtin_sqrtf(squares);
  const float scale = norm > 0.0f ? 1.0f / norm : 0.0f, inv = norm;
  auto* q = reinterpret_cast<uint16_t*>(out);
  float rest = 0.0f, rounded_squares = 0.0f;
  for (int64_t i = 0; i < d; ++i) {
    const uint32_t bits = to_bf16(x[i] * scale);
    const float back = from_bf16(bits) * inv, gap = x[i] - back;
    q[i] = static_cast<uint16_t>(bits);
    rest += gap * gap;
    rounded_squares += back * back;
  }
  for (int64_t i = d; i < 2 * pairs; ++i) q[i] = 0;
  const float sum_error = static_cast<float>(d) * 6.0e-8f * norm;
  *stats = {inv, 0.5f * (rounded ? rounded_squares : squares), norm * kUp + kTiny,
            __builtin_sqrtf(rest) * kUp + 1e-6f * norm + sum_error};
}

#ifdef PLANMILL_EMULATE
using Vec = VecGeneric<16>;
#include "common/amx_emulation.h"
#else
using Vec = VecAvx512;
#endif

constexpr int kTile = 16;                         // rows of a tile, and 32-bit words of a tile row
constexpr int kPanel = 2 * kTile;                 // rows of a panel
constexpr int64_t kTileWords = kTile * kTile;     // 1 KiB
constexpr int64_t kBlocksPerPass = 16;            // 16 pairs each: a right panel of this depth is 32 KiB

// Left panel: [block of 16 pairs][tile of 16 rows][row][pair]
void put_left(const uint32_t* rows, int64_t pairs, uint32_t* panel) {
  for (int64_t block = 0; block < pairs / kTile; ++block)
    for (int lane = 0; lane < kPanel; ++lane, panel += kTile)
      __builtin_memcpy(panel, rows + lane * pairs + block * kTile, kTile * sizeof(uint32_t));
}

// Right panel: [block of 16 pairs][tile of 16 columns][pair][column]
void put_right(const uint32_t* rows, int64_t pairs, uint32_t* panel) {
  for (int64_t block = 0; block < pairs / kTile; ++block)
    for (int tile = 0; tile < 2; ++tile, panel += kTileWords)
      for (int column = 0; column < kTile; ++column)
        for (int p = 0; p < kTile; ++p)
          panel[p * kTile + column] = rows[(tile * kTile + column) * pairs + block * kTile + p];
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void multiply(const uint32_t* left, const uint32_t* right, int64_t left_panels, int64_t right_panels, int64_t pairs,
              void* out, int64_t ld) {
  TileConfig before, config;
  _tile_storeconfig(&before);
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = kTile;
  _tile_loadconfig(&config);
  auto* c = static_cast<float*>(out);
  const int64_t blocks = pairs / kTile, row_bytes = ld * 4;
  for (int64_t j = 0; j < right_panels; ++j)
    for (int64_t first = 0; first < blocks; first += kBlocksPerPass) {
      const int64_t last = first + kBlocksPerPass < blocks ? first + kBlocksPerPass : blocks;
      for (int64_t i = 0; i < left_panels; ++i) {
        float* corner = c + i * kPanel * ld + j * kPanel;
        const uint32_t* a = left + (i * blocks + first) * 2 * kTileWords;
        const uint32_t* b = right + (j * blocks + first) * 2 * kTileWords;
        if (first == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, corner, row_bytes);
          _tile_loadd(1, corner + kTile, row_bytes);
          _tile_loadd(2, corner + kTile * ld, row_bytes);
          _tile_loadd(3, corner + kTile * ld + kTile, row_bytes);
        }
        for (int64_t k = first; k < last; ++k, a += 2 * kTileWords, b += 2 * kTileWords) {
          _tile_loadd(4, a, 64);
          _tile_loadd(6, b, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b + kTileWords, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a + kTileWords, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, corner, row_bytes);
        _tile_stored(1, corner + kTile, row_bytes);
        _tile_stored(2, corner + kTile * ld, row_bytes);
        _tile_stored(3, corner + kTile * ld + kTile, row_bytes);
      }
    }
  if (before.palette != 0) _tile_loadconfig(&before);  // another library's tiles, as they were
  else _tile_release();
}

}  // namespace

const ScreenKernels* screen_amx() {
  static constexpr ScreenKernels kernels = {"amx",
                                            kPanel,
                                            kPanel,
                                            false,
                                            false,
                                            256,
                                            &prepare<Vec>,
                                            &words_of_pairs<kTile>,
                                            &quantize_bf16<Vec>,
                                            &quantize_bf16<Vec>,
                                            &put_left,
                                            &put_right,
                                            &multiply,
                                            &lower_bounds<Vec, false>,
                                            &candidates<Vec>,
                                            &maxima<Vec, false>,
                                            &group_bounds<Vec, false>,
                                            &list_above<Vec, false>,
                                            &two_lower_bounds<Vec, false>,
                                            &list_pairs<Vec>,
                                            &list_nearest<Vec, false>,
                                            &against_all<Vec, true>,
                                            &against_all<Vec, false>};
  return &kernels;
}

}  // namespace planmill
