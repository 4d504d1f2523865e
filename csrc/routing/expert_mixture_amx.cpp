// expert_mixture for AMX-bf16: bfloat16 weights go into the tile registers straight from their plain layout, 16 rows of 32
// channels at a time, and meet rows of x that were rounded to bfloat16. Other weights, and all else, are as for AVX-512.
// PLANMILL_EMULATE: tile registers as plain arrays, for tests on machines without AMX.
#ifndef PLANMILL_EMULATE
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
#define PLANMILL_AVX512
#else
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_TURN
#include <immintrin.h>
#endif
#include "routing/expert_mixture_kernels.h"

namespace planmill {
namespace {

#ifdef PLANMILL_EMULATE
using Vec = VecGeneric<16>;
float from_bf16(uint32_t bits) { return widen(BFloat16{static_cast<uint16_t>(bits)}); }
#include "common/amx_emulation.h"
#else
using Vec = VecAvx512;
#endif

constexpr int kTile = 16;                    // rows of a tile, and pairs of channels in a row
constexpr int64_t kStepChannels = 2 * kTile;
constexpr int64_t kTileWords = kTile * kTile;  // of 32 bits

// To the nearest, ties to even; NaN stays.
inline uint32_t round_bf16(float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, kept = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? kept : rounded;
}

// out[r][i] = tile[i][r], both 16 x 16 numbers of 32 bits; rows of `out` `stride` numbers apart; added unless `first`.
inline void turn(const float* tile, float* out, int64_t stride, int64_t rows, bool first) {
  for (int quad = 0; quad < kTile; quad += 4)
    for (int half = 0; half < kTile; half += 8) {
      __m256 columns[4];
      transpose_rows(tile + half * kTile + quad, kTile, columns);
      for (int i = 0; i < 4 && quad + i < rows; ++i) {
        float* to = out + (quad + i) * stride + half;
        _mm256_storeu_ps(to, first ? columns[i] : _mm256_add_ps(columns[i], _mm256_loadu_ps(to)));
      }
    }
}

// [block of 32 rows][step of 32 channels][tile of 16 rows][pair of channels][row], zero beyond the rows and channels.
void arrange(const float* x, int64_t stride, int64_t rows, int64_t k, int64_t step, int64_t steps, uint32_t* out) {
  for (int64_t row = 0; row < rows; row += kTile)
    for (int64_t c = 0; c < k; c += kStepChannels) {
      alignas(64) uint16_t tile[kTile][kStepChannels];
      const int64_t channels = k - c < kStepChannels ? k - c : kStepChannels;
      for (int64_t lane = 0; lane < kTile; ++lane) {
        const float* from = x + (row + lane) * stride + c;
        if (row + lane < rows && channels == kStepChannels) {
          for (int64_t i = 0; i < kStepChannels; ++i) tile[lane][i] = static_cast<uint16_t>(round_bf16(from[i]));
          continue;
        }
        for (int64_t i = 0; i < kStepChannels; ++i)
          tile[lane][i] = row + lane < rows && i < channels ? static_cast<uint16_t>(round_bf16(from[i])) : 0;
      }
      const int64_t at = (row / (2 * kTile) * steps + step + c / kStepChannels) * 2 + row / kTile % 2;
      alignas(64) float words[kTile][kTile];
      __builtin_memcpy(words, tile, sizeof(words));
      turn(words[0], reinterpret_cast<float*>(out + at * kTileWords), kTile, kTile, true);
    }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// 16 rows of w, channels from c on: in place where all of it is there, else copied beside zeros.
struct Weights {
  const BFloat16* w;
  int64_t ld, rows, k;
  alignas(64) BFloat16 copy[2][kTile][kStepChannels];

  void load(int half, int64_t c, const void** base, int64_t* stride) {
    const int64_t first = half * kTile, channels = k - c < kStepChannels ? k - c : kStepChannels;
    if (first + kTile <= rows && channels == kStepChannels) {
      *base = w + first * ld + c;
      *stride = ld * 2;
      return;
    }
    __builtin_memset(copy[half], 0, sizeof(copy[half]));
    for (int64_t r = 0; r < kTile && first + r < rows; ++r)
      __builtin_memcpy(copy[half][r], w + (first + r) * ld + c, static_cast<uint64_t>(channels) * 2);
    *base = copy[half];
    *stride = kStepChannels * 2;
  }
};

void multiply_tiles(const void* w, int64_t ld, int64_t columns, const uint32_t* x, int64_t rows, int64_t k, float* z,
                    int64_t ldz, bool first, const char* next) {
  Weights weights{static_cast<const BFloat16*>(w), ld, columns, k, {}};
  const bool wide = columns > kTile;
  alignas(64) float sums[4][kTileWords];
  for (int64_t row = 0; row < rows; row += 2 * kTile) {
    const bool tall = rows - row > kTile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < k; c += kStepChannels, x += 2 * kTileWords) {
      const void* base;
      int64_t stride;
      if (next != nullptr && row == 0)
        for (int64_t r = 0; r < 2 * kTile; ++r) __builtin_prefetch(next + (r * ld + c) * 2, 0, 2);
      weights.load(0, c, &base, &stride);
      _tile_loadd(4, base, stride);
      _tile_loadd(6, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (tall) {
        _tile_loadd(7, x + kTileWords, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (!wide) continue;
      weights.load(1, c, &base, &stride);
      _tile_loadd(5, base, stride);
      _tile_dpbf16ps(2, 5, 6);
      if (tall) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int t = 0; t < (wide ? 4 : 2); ++t)
      turn(sums[t], z + (row + (t & 1) * kTile) * ldz + t / 2 * kTile, ldz, rows - row - (t & 1) * kTile, first);
  }
}

// Other libraries' tiles are given back as they were.
void start_tiles(TileState* before) {
  static_assert(sizeof(TileConfig) <= sizeof(TileState));
  auto* kept = reinterpret_cast<TileConfig*>(before);
  TileConfig config;
  _tile_storeconfig(kept);
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = kTile;
  _tile_loadconfig(&config);
}

void stop_tiles(const TileState* before) {
  const auto* kept = reinterpret_cast<const TileConfig*>(before);
  if (kept->palette != 0) _tile_loadconfig(kept);
  else _tile_release();
}

}  // namespace

const ExpertMixtureKernels* expert_mixture_amx() {
  static constexpr ExpertMixtureKernels kernels = [] {
    ExpertMixtureKernels made = expert_mixture_kernels<Vec>();
    made.tiles = {&start_tiles, &stop_tiles, &arrange, &multiply_tiles};
    return made;
  }();
  return &kernels;
}

}  // namespace planmill
