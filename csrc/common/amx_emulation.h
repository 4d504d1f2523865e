// The AMX instructions that the *_amx.cpp files use, in plain C++, for tests on machines without AMX. The including file has
// `float from_bf16(uint32_t)`.

alignas(64) thread_local float emulated_tile[8][16][16];

void emulate_load(int tile, const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    __builtin_memcpy(emulated_tile[tile][r], static_cast<const char*>(base) + r * stride, 64);
}

void emulate_store(int tile, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(base) + r * stride, emulated_tile[tile][r], 64);
}

void emulate_dot(int sum, int left, int right) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      uint32_t a;
      __builtin_memcpy(&a, &emulated_tile[left][m][k], 4);
      for (int n = 0; n < 16; ++n) {
        uint32_t b;
        __builtin_memcpy(&b, &emulated_tile[right][k][n], 4);
        emulated_tile[sum][m][n] += from_bf16(a & 0xffff) * from_bf16(b & 0xffff);
        emulated_tile[sum][m][n] += from_bf16(a >> 16) * from_bf16(b >> 16);
      }
    }
}

#undef _tile_zero  // macros where <immintrin.h> was included
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_storeconfig(config) ((config)->palette = 0)
#define _tile_loadconfig(config) (void)(config)
#define _tile_release() (void)0
#define _tile_zero(tile) __builtin_memset(emulated_tile[tile], 0, sizeof(emulated_tile[tile]))
#define _tile_loadd(tile, base, stride) emulate_load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulate_store(tile, base, stride)
#define _tile_dpbf16ps(sum, left, right) emulate_dot(sum, left, right)
