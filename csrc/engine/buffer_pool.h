// Large buffers of a plan, kept from one call to the next. malloc gives freed memory back to the system by rules of its own
// (glibc: what exceeds 32 MiB at once, and the rest by what it has seen freed), and each page that comes again costs half a
// microsecond or more: tens of megabytes a call are a tenth of a network's time.
//
// A network asks for the same sizes in the same order in each call. So a call's requests are written down, and the next
// call of the same kind finds a place for each of them in one block, worked out beforehand: about as large as what is alive
// at once, where a buffer for each size would be twice that.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace planmill {

// A buffer of a call: what was asked for, and between which of the call's requests and releases, counted together.
struct Request {
  static constexpr uint64_t kNever = ~uint64_t{0};
  size_t bytes;
  uint64_t from;
  uint64_t until = kNever;  // outlives the call
  size_t offset = 0;        // its place in the block, where it does not outlive the call
};

// Give each request that ends a place, so that no two that live at once overlap; returns the bytes of the block. The largest
// first, each into the smallest gap that holds it (Pisarchyk and Lee 2020, "Efficient memory management for deep neural
// net inference", greedy by size).
size_t place(std::vector<Request>& requests);

// For several threads at once. A buffer may outlive the pool's owner: outputs are buffers too.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  static constexpr size_t kLeast = 256 << 10;  // bytes of a buffer that comes from a pool; malloc is good at smaller ones

  BufferPool() = default;
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;
  ~BufferPool();

  c10::DataPtr allocate(size_t bytes);
  void begin_call();
  // Learns the order of a new kind of call; buffers that the last few calls did not need go.
  void end_call();
  // The owner is gone: what is free goes at once, and the rest when it is freed.
  void close();
  // Of the block and of single buffers, as far as nobody has them.
  size_t free_bytes() const;

 private:
  // Memory of its own: a single one, or the block.
  struct Buffer {
    std::shared_ptr<char> data;
    size_t bytes = 0;
    uint64_t used = 0;  // the last call that took it
  };
  // Part of the block or a whole buffer, while somebody has it.
  struct Loan {
    std::shared_ptr<char> owner;  // frees the memory, however late the loan ends
    size_t bytes;
    uint64_t call;
    size_t index;  // of its request in that call
    bool single;
  };
  struct Order {
    std::vector<Request> requests;
    size_t bytes = 0;  // of the block
  };

  const Request* next_expected();
  char* from_block(const Request& request);
  std::pair<std::shared_ptr<char>, size_t> single(size_t size);
  void give_back(char* data, const Loan& loan);

  mutable std::mutex mutex_;
  std::vector<Buffer> free_;  // what was freed last stands last
  Buffer block_;
  std::map<char*, size_t> in_block_;  // what of the block is lent
  std::map<size_t, Order> orders_;    // by the first size: calls with other numbers of samples begin with another one
  const Order* following_ = nullptr;
  std::vector<Request> seen_;
  uint64_t call_ = 0, step_ = 0;
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
