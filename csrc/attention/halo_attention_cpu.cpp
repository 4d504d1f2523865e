// halo_attention on the CPU: blocks of all heads and images side by side, float32; 16-bit inputs are converted whole.
#include "common/torch_headers.h"

#include <memory>

#include "attention/halo_attention.h"
#include "common/cpu_capability.h"

namespace planmill {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiplications that are worth a thread

// Head h of image b of a tensor [B, heads, d, H, W].
HaloPlanes planes(const at::Tensor& x, int64_t b, int64_t h) {
  return {x.const_data_ptr<float>() + b * x.stride(0) + h * x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

at::Tensor halo_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& rel_h,
                          const at::Tensor& rel_w, int64_t block, int64_t halo, int64_t stride, double scale, bool masked,
                          bool scale_positions) {
  const int64_t batch = q.size(0), heads = q.size(1), plane = q.size(3) * q.size(4);
  const at::Tensor queries = q.to(at::kFloat), keys = k.to(at::kFloat), values = v.to(at::kFloat);
  const at::Tensor by_row = rel_h.to(at::kFloat).contiguous(), by_column = rel_w.to(at::kFloat).contiguous();
  at::Tensor y = at::empty({batch, heads, v.size(2), q.size(3), q.size(4)}, at::kFloat);
  if (y.numel() == 0) return y.to(q.scalar_type());
  const HaloShape shape{q.size(2), v.size(2), k.size(3), k.size(4), block, halo, stride, static_cast<float>(scale), masked,
                        scale_positions, by_row.const_data_ptr<float>(), by_column.const_data_ptr<float>()};
  const HaloKernels& kernels =
      choose_kernels(halo_attention_baseline(), halo_attention_avx2(), halo_attention_avx512());
  const int64_t rows = shape.height / block, columns = shape.width / block, blocks = rows * columns;
  const int64_t side = shape.queries(), work = side * side * shape.window() * shape.window() * (shape.d + shape.dv);
  float* to = y.data_ptr<float>();
  at::parallel_for(0, batch * heads * blocks, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(halo_scratch(shape, kernels.slab))]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, b = image / heads, h = image % heads, at = task % blocks;
      const HaloHead head{planes(queries, b, h), planes(keys, b, h), planes(values, b, h), to + image * shape.dv * plane};
      kernels.attend(shape, head, at / columns, at % columns, scratch.get());
    }
  });
  return y.to(q.scalar_type());
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("halo_attention", &halo_attention); }

}  // namespace
}  // namespace planmill
