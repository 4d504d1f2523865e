// CUDA C++ on the host, for tests: every thread of a CTA is a thread of the machine, __syncthreads a barrier. A kernel
// compiled behind this header is the very source that ships; a missing barrier is a data race that -fsanitize=thread sees.
// CTAs run one after the other. Kernels use dynamic shared memory only, declared `extern __shared__ int shared_memory[]`;
// it starts as garbage, and a guard behind it finds stores past its end.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __restrict__ __restrict

namespace emulated {

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};

struct Warp {
  std::barrier<> barrier{32};
  unsigned slots[32];
};

struct Cta {
  explicit Cta(unsigned threads) : barrier(threads), warps(threads / 32) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
  std::atomic<int> any{0};
};

constexpr size_t kSharedBytes = 232448, kGuard = 4096;
inline thread_local Cta* cta = nullptr;
inline thread_local Warp* warp = nullptr;

}  // namespace emulated

inline thread_local emulated::Dim3 threadIdx, blockIdx;
inline emulated::Dim3 blockDim, gridDim;
alignas(128) int shared_memory[(emulated::kSharedBytes + emulated::kGuard) / sizeof(int)];

namespace emulated {

// Every lane's value, in every lane; nobody writes the next one before all have read this one.
template <typename Read>
auto exchange(unsigned value, Read read) {
  warp->slots[threadIdx.x & 31] = value;
  warp->barrier.arrive_and_wait();
  auto result = read(static_cast<const unsigned*>(warp->slots));
  warp->barrier.arrive_and_wait();
  return result;
}

}  // namespace emulated

inline void __syncthreads() { emulated::cta->barrier.arrive_and_wait(); }
inline int __syncthreads_or(int value) {
  emulated::Cta& cta = *emulated::cta;
  if (value != 0) cta.any = 1;
  cta.barrier.arrive_and_wait();
  const int result = cta.any;
  cta.barrier.arrive_and_wait();  // nobody clears it before all have read it
  cta.any = 0;
  cta.barrier.arrive_and_wait();
  return result;
}
inline void __syncwarp() { emulated::warp->barrier.arrive_and_wait(); }
inline int atomicAdd(int* where, int value) { return __atomic_fetch_add(where, value, __ATOMIC_RELAXED); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

inline unsigned __match_any_sync(unsigned, unsigned value) {
  return emulated::exchange(value, [value](const unsigned* slots) {
    unsigned alike = 0;
    for (int lane = 0; lane < 32; ++lane) alike |= static_cast<unsigned>(slots[lane] == value) << lane;
    return alike;
  });
}

inline int __shfl_up_sync(unsigned, int value, int step) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  return emulated::exchange(static_cast<unsigned>(value), [lane, step](const unsigned* slots) {
    return static_cast<int>(slots[lane >= step ? lane - step : lane]);
  });
}

inline int __shfl_sync(unsigned, int value, int from) {
  return emulated::exchange(static_cast<unsigned>(value),
                            [from](const unsigned* slots) { return static_cast<int>(slots[from & 31]); });
}

namespace emulated {

template <typename... Args, size_t... I>
void call(void (*kernel)(Args...), void* const* args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Args>*>(args[I])...);
}

// As cuLaunchKernel: a pointer to each argument. Returns nonzero where shared memory was written past its end.
template <typename... Args>
int launch(void (*kernel)(Args...), unsigned grid, unsigned threads, size_t shared_bytes, void* const* args) {
  if (threads == 0 || threads % 32 || threads > 1024 || shared_bytes > kSharedBytes) return 2;
  auto* const bytes = reinterpret_cast<unsigned char*>(shared_memory);
  blockDim = {threads, 1, 1};
  gridDim = {grid, 1, 1};
  for (unsigned block = 0; block < grid; ++block) {
    std::memset(bytes, 0xcd, shared_bytes + kGuard);
    Cta shared(threads);
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([&, t, block] {
        threadIdx = {t, 0, 0};
        blockIdx = {block, 0, 0};
        cta = &shared;
        warp = &shared.warps[t / 32];
        call(kernel, args, std::index_sequence_for<Args...>{});
      });
    }
    for (std::thread& thread : running) thread.join();
    for (size_t i = 0; i < kGuard; ++i) {
      if (bytes[shared_bytes + i] != 0xcd) return 1;
    }
  }
  return 0;
}

}  // namespace emulated
