// See buffer_pool.h. torch asks one allocator for all memory of CPUs; the one put in front of it here looks whether the
// thread that asks is running a plan, and passes every other request on.
#include "engine/buffer_pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <limits>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace planmill {
namespace {

constexpr uint64_t kCalls = 4;      // after which a buffer that nothing needs goes
constexpr size_t kKinds = 64;       // of calls whose order is remembered
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

std::shared_ptr<char> memory(size_t bytes) { return {static_cast<char*>(c10::alloc_cpu(bytes)), c10::free_cpu}; }

}  // namespace

size_t place(std::vector<Request>& requests) {
  std::vector<Request*> largest_first, placed, neighbours;
  for (Request& request : requests)
    if (request.until != Request::kNever) largest_first.push_back(&request);
  std::ranges::stable_sort(largest_first, std::greater{}, &Request::bytes);
  size_t total = 0;
  for (Request* request : largest_first) {
    neighbours.clear();
    for (Request* other : placed)
      if (other->from < request->until && request->from < other->until) neighbours.push_back(other);
    std::ranges::sort(neighbours, {}, &Request::offset);
    size_t end = 0, smallest = std::numeric_limits<size_t>::max();
    for (const Request* other : neighbours) {
      const size_t gap = other->offset > end ? other->offset - end : 0;
      if (gap >= request->bytes && gap < smallest) smallest = gap, request->offset = end;
      end = std::max(end, other->offset + other->bytes);
    }
    if (smallest == std::numeric_limits<size_t>::max()) request->offset = end;
    total = std::max(total, request->offset + request->bytes);
    placed.push_back(request);
  }
  return total;
}

BufferPool::~BufferPool() { close(); }

c10::DataPtr BufferPool::allocate(size_t bytes) {
  const size_t size = (bytes + kStep - 1) / kStep * kStep;
  Loan loan{nullptr, size, 0, 0, false};
  char* data = nullptr;
  {
    const std::lock_guard lock(mutex_);
    loan.call = call_, loan.index = seen_.size();
    seen_.push_back({size, step_++});
    const Request* expected = next_expected();
    if (expected != nullptr && expected->until != Request::kNever) data = from_block(*expected);
    if (data != nullptr) {
      loan.owner = block_.data;
    } else {
      loan.single = true;
      std::tie(loan.owner, loan.bytes) = single(size);
      data = loan.owner.get();
    }
  }
  lent().add(data, [pool = shared_from_this(), data, loan] { pool->give_back(data, loan); });
  return {data, data, &Front::release, c10::Device(c10::DeviceType::CPU)};
}

// What the call asks for now if it goes on as the last one of its kind; null where it does not.
const Request* BufferPool::next_expected() {
  const size_t index = seen_.size() - 1, bytes = seen_.back().bytes;
  if (index == 0) {
    const auto known = orders_.find(bytes);
    following_ = known == orders_.end() ? nullptr : &known->second;
  }
  if (following_ == nullptr) return nullptr;
  if (index >= following_->requests.size() || following_->requests[index].bytes != bytes) return following_ = nullptr, nullptr;
  return &following_->requests[index];
}

// Null where somebody still has that place: a call may have let go of it later than the one that the order is from.
char* BufferPool::from_block(const Request& request) {
  if (block_.bytes < following_->bytes) {
    in_block_.clear();  // what is lent of the old one keeps it alive
    block_ = {};
    block_ = {memory(following_->bytes), following_->bytes, call_};
  }
  if (2 * following_->bytes >= block_.bytes) block_.used = call_;
  char *const first = block_.data.get() + request.offset, *const last = first + request.bytes;
  const auto next = in_block_.lower_bound(first);
  if (next != in_block_.end() && next->first < last) return nullptr;
  if (next != in_block_.begin() && std::prev(next)->first + std::prev(next)->second > first) return nullptr;
  in_block_.emplace_hint(next, first, request.bytes);
  return first;
}

// A buffer of its own, not twice as large as it must be, and how large it is.
std::pair<std::shared_ptr<char>, size_t> BufferPool::single(size_t size) {
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it)  // of equal ones the last: it may still be in the cache
    if (it->bytes >= size && it->bytes <= 2 * size && (best == free_.end() || it->bytes <= best->bytes)) best = it;
  if (best == free_.end()) return {memory(size), size};
  std::pair found{std::move(best->data), best->bytes};
  free_.erase(best);
  return found;
}

void BufferPool::give_back(char* data, const Loan& loan) {
  const std::lock_guard lock(mutex_);
  const bool inside = loan.call == call_ && loan.index < seen_.size();  // the call goes on
  if (inside) seen_[loan.index].until = step_++;
  if (loan.single) {
    // What a call of an unknown kind lets go would add up, and be the block's the next time.
    if (!closed_ && !(inside && following_ == nullptr)) free_.push_back({loan.owner, loan.bytes, loan.call});
  } else if (loan.owner == block_.data) {
    in_block_.erase(data);
  }
}

void BufferPool::begin_call() {
  const std::lock_guard lock(mutex_);
  ++call_, step_ = 0;
  seen_.clear();
  following_ = nullptr;
}

void BufferPool::end_call() {
  const std::lock_guard lock(mutex_);
  if (!seen_.empty() && (following_ == nullptr || following_->requests.size() != seen_.size())) {
    if (orders_.size() == kKinds) orders_.clear();
    Order& order = orders_[seen_.front().bytes];
    order.requests = std::move(seen_);
    order.bytes = place(order.requests);
  }
  seen_.clear();
  following_ = nullptr;
  std::erase_if(free_, [&](const Buffer& buffer) { return buffer.used + kCalls <= call_; });
  if (block_.used + kCalls <= call_) {
    in_block_.clear();
    block_ = {};
  }
}

void BufferPool::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  free_.clear();
  in_block_.clear();
  block_ = {};
}

size_t BufferPool::free_bytes() const {
  const std::lock_guard lock(mutex_);
  size_t sum = block_.bytes;
  for (const auto& [data, bytes] : in_block_) sum -= bytes;
  for (const Buffer& buffer : free_) sum += buffer.bytes;
  return sum;
}

PoolGuard::PoolGuard(BufferPool& pool) : pool_(&pool), before_(pool_in_use) {
  Front::install();
  pool_->begin_call();
  pool_in_use = pool_;
}

PoolGuard::~PoolGuard() {
  pool_in_use = before_;
  pool_->end_call();
}

}  // namespace planmill
