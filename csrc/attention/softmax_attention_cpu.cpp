// softmax_attention on the CPU: heads side by side, each cut into tasks of some queries where heads are few; float32.
#include "common/torch_headers.h"

#include <memory>

#include "attention/softmax_attention.h"
#include "common/cpu_capability.h"

namespace planmill {
namespace {

constexpr int64_t kKeys = 256;         // of a block: with 64 channels 128 KB, which a second-level cache holds
constexpr int64_t kQueries = 256;      // of a task
constexpr int64_t kFewQueries = 48;    // below that packing costs a third of the products
constexpr int64_t kLeastWork = 1 << 18;  // multiplications that are worth another thread

int64_t whole(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Head h of sample b of a tensor [B, H, N, d].
AttentionRows rows_of(const at::Tensor& x, int64_t b, int64_t h) {
  return {x.const_data_ptr<float>() + b * x.stride(0) + h * x.stride(1), x.stride(2), x.stride(3)};
}

at::Tensor softmax_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), dv = v.size(3);
  at::Tensor y = at::empty({batch, queries, heads, dv}, q.options());
  if (y.numel() == 0) return y;
  if (keys == 0) return y.zero_();
  const SoftmaxAttentionKernels& kernels =
      choose_kernels(softmax_attention_baseline(), softmax_attention_avx2(), softmax_attention_avx512());
  const int64_t panel = 2 * kernels.width, threads = at::get_num_threads();
  // Enough tasks for the threads, of whole slabs.
  const int64_t wanted = std::max(whole(queries, kQueries), threads > 1 ? whole(4 * threads, batch * heads) : 1);
  const int64_t least = std::max(whole(queries, wanted), std::min(queries, kFewQueries));
  const int64_t size = whole(least, kernels.slab) * kernels.slab, tasks = whole(queries, size);
  const int64_t blocks = whole(keys, kKeys), block = whole(whole(keys, blocks), panel) * panel;
  const AttentionShape shape{keys, q.size(3), dv, static_cast<float>(scale), block, std::min(size, queries),
                             whole(dv, panel) * panel};
  float* to = y.mutable_data_ptr<float>();
  const int64_t work = std::min(size, queries) * keys * (shape.d + dv);
  const int64_t grain = std::max<int64_t>(1, kLeastWork / std::max<int64_t>(work, 1));
  at::parallel_for(0, batch * heads * tasks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(attention_scratch(shape, kernels.slab))]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / tasks, b = image / heads, h = image % heads, first = i % tasks * size;
      const AttentionHead head{rows_of(q, b, h), rows_of(k, b, h), rows_of(v, b, h),
                               to + (b * queries * heads + h) * dv, heads * dv};
      const bool packed = shape.blocks() == 1 && i > begin && first > 0;
      kernels.attend(shape, head, first, std::min(queries, first + size), packed, scratch.get());
    }
  });
  return y;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("softmax_attention", &softmax_attention); }

}  // namespace
}  // namespace planmill
