// See buffer_pool.h. torch asks one allocator for all memory of CPUs; the one put in front of it here looks whether the
// thread that asks is running a plan, and passes every other request on.
#include "engine/buffer_pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <functional>
#include <unordered_map>
#include <utility>

namespace planmill {
namespace {

constexpr uint64_t kCalls = 4;      // after which a buffer that nothing needs goes
constexpr size_t kStep = 64 << 10;  // sizes are multiples of it
thread_local BufferPool* pool_in_use = nullptr;

// Callers of `raw_allocate` (oneDNN's scratch memory) have nothing but the address to free it by, so that an address says
// whose it is.
class Lent {
 public:
  void add(void* data, std::function<void()> give_back) {
    const std::lock_guard lock(mutex_);
    lent_.emplace(data, std::move(give_back));
  }
  // Give it back; false where no pool has lent it.
  bool end(void* data) {
    std::function<void()> give_back;
    {
      const std::lock_guard lock(mutex_);
      const auto found = lent_.find(data);
      if (found == lent_.end()) return false;
      give_back = std::move(found->second);
      lent_.erase(found);
    }
    give_back();
    return true;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<void*, std::function<void()>> lent_;
};

Lent& lent() {  // never destroyed: tensors may be freed after everything else
  static auto* const all = new Lent;
  return *all;
}

class Front final : public c10::Allocator {
 public:
  static void install() {
    static const bool done = [] {
      behind = c10::GetCPUAllocator();
      c10::SetCPUAllocator(new Front);
      return true;
    }();
    (void)done;
  }

  c10::DataPtr allocate(size_t bytes) override {
    return pool_in_use != nullptr && bytes >= BufferPool::kLeast ? pool_in_use->allocate(bytes) : behind->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return behind->raw_deleter() == nullptr ? nullptr : &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static void release(void* data) {
    if (data != nullptr && !lent().end(data)) behind->raw_deleter()(data);
  }

 private:
  static inline c10::Allocator* behind = nullptr;
};

}  // namespace

BufferPool::~BufferPool() { close(); }

c10::DataPtr BufferPool::allocate(size_t bytes) {
  const size_t size = (bytes + kStep - 1) / kStep * kStep;
  Buffer found{nullptr, size, 0};
  {
    const std::lock_guard lock(mutex_);
    found.used = call_;
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it)  // of equal ones the last: it may still be in the cache
      if (it->bytes >= size && it->bytes <= 2 * size && (best == free_.end() || it->bytes <= best->bytes)) best = it;
    if (best != free_.end()) {
      found.data = best->data, found.bytes = best->bytes;
      free_.erase(best);
    }
  }
  if (found.data == nullptr) found.data = c10::alloc_cpu(found.bytes);
  lent().add(found.data, [pool = shared_from_this(), found] { pool->give_back(found); });
  return {found.data, found.data, &Front::release, c10::Device(c10::DeviceType::CPU)};
}

void BufferPool::give_back(Buffer buffer) {
  {
    const std::lock_guard lock(mutex_);
    if (!closed_) return free_.push_back(buffer);
  }
  c10::free_cpu(buffer.data);
}

void BufferPool::end_call() {
  const std::lock_guard lock(mutex_);
  ++call_;
  std::erase_if(free_, [&](const Buffer& buffer) {
    const bool old = buffer.used + kCalls < call_;
    if (old) c10::free_cpu(buffer.data);
    return old;
  });
}

void BufferPool::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  for (const Buffer& buffer : free_) c10::free_cpu(buffer.data);
  free_.clear();
}

size_t BufferPool::free_bytes() const {
  const std::lock_guard lock(mutex_);
  size_t sum = 0;
  for (const Buffer& buffer : free_) sum += buffer.bytes;
  return sum;
}

PoolGuard::PoolGuard(BufferPool& pool) : pool_(&pool), before_(pool_in_use) {
  Front::install();
  pool_in_use = pool_;
}

PoolGuard::~PoolGuard() {
  pool_in_use = before_;
  pool_->end_call();
}

}  // namespace planmill
