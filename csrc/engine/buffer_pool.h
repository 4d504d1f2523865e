// Large buffers of a plan, kept from one call to the next. malloc gives freed memory back to the system by rules of its own
// (glibc: what exceeds 32 MiB at once, and the rest by what it has seen freed), and each page that comes again costs half a
// microsecond or more: tens of megabytes a call are a tenth of a network's time.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace planmill {

// For several threads at once. A buffer may outlive the pool's owner: outputs are buffers too.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  static constexpr size_t kLeast = 256 << 10;  // bytes of a buffer that comes from a pool; malloc is good at smaller ones

  BufferPool() = default;
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;
  ~BufferPool();

  c10::DataPtr allocate(size_t bytes);
  // Between two calls: buffers that the last few did not need go.
  void end_call();
  // The owner is gone: what is free goes at once, and the rest when it is freed.
  void close();
  size_t free_bytes() const;

 private:
  struct Buffer {
    void* data;
    size_t bytes;
    uint64_t used;  // the last call that took it
  };

  void give_back(Buffer buffer);

  mutable std::mutex mutex_;
  std::vector<Buffer> free_;  // what was freed last stands last
  uint64_t call_ = 0;
  bool closed_ = false;
};

// While this stands, large buffers that torch allocates on this thread come from a pool.
class PoolGuard {
 public:
  explicit PoolGuard(BufferPool& pool);
  PoolGuard(const PoolGuard&) = delete;
  PoolGuard& operator=(const PoolGuard&) = delete;
  ~PoolGuard();

 private:
  BufferPool *pool_, *before_;
};

}  // namespace planmill
