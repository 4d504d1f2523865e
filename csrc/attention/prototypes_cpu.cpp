// prototype_attention on the CPU: tiles of tokens, whose weights stay in the first-level cache until they meet the table.
#include "common/torch_headers.h"

#include <ATen/ops/zeros.h>

#include "attention/prototypes.h"
#include "common/cpu_capability.h"

namespace planmill {
namespace {

int64_t round_up(int64_t n, int64_t size) { return (n + size - 1) / size * size; }

// Keys [H, M, d] of one sample at unit length, each head transposed to [d][padded M].
void pack_keys(const float* keys, int64_t heads, int64_t prototypes, int64_t width, float* out) {
  const int64_t padded = round_up(prototypes, kPrototypePad);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t m = 0; m < prototypes; ++m) {
      const float* k = keys + (h * prototypes + m) * width;
      double square = 0.0;
      for (int64_t c = 0; c < width; ++c) square += static_cast<double>(k[c]) * k[c];
      const double length = std::sqrt(square), inverse = 1.0 / (length < 1e-12 ? 1e-12 : length);
      for (int64_t c = 0; c < width; ++c) out[(h * width + c) * padded + m] = static_cast<float>(k[c] * inverse);
    }
}

// Table [rows, columns] of one sample in blocks of columns.
void pack_table(const float* table, int64_t rows, int64_t columns, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      out[(c / kPrototypeBlock * rows + r) * kPrototypeBlock + c % kPrototypeBlock] = table[r * columns + c];
}

at::Tensor prototype_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& table, const at::Tensor& tau,
                               const at::Tensor& bias) {
  at::Tensor x = q.to(at::kFloat);
  if (x.stride(3) != 1) x = x.contiguous();
  const at::Tensor k = keys.to(at::kFloat).contiguous(), t = table.to(at::kFloat).contiguous();
  const at::Tensor factors = tau.to(at::kFloat).contiguous(), b = bias.to(at::kFloat).contiguous();
  const int64_t batch = x.size(0), tokens = x.size(1), heads = x.size(2), width = x.size(3);
  const int64_t prototypes = k.size(2), rows = t.size(1), columns = t.size(2);
  at::Tensor out = at::empty({batch, tokens, columns}, x.options());
  if (out.numel() == 0) return out.to(q.scalar_type());
  const int64_t padded = round_up(prototypes, kPrototypePad), wide = round_up(columns, kPrototypeBlock);
  at::Tensor packed = at::zeros({batch, heads * width * padded}, x.options());
  at::Tensor blocks = at::zeros({batch, rows * wide}, x.options());
  at::Tensor start = at::zeros({wide}, x.options());
  std::copy_n(b.const_data_ptr<float>(), columns, start.data_ptr<float>());
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_keys(k.const_data_ptr<float>() + i * heads * prototypes * width, heads, prototypes, width,
                packed.data_ptr<float>() + i * heads * width * padded);
      pack_table(t.const_data_ptr<float>() + i * rows * columns, rows, columns, blocks.data_ptr<float>() + i * rows * wide);
    }
  });
  const PrototypeKernels& kernels = choose_kernels(prototypes_baseline(), prototypes_avx2(), prototypes_avx512());
  const int64_t tiles = (tokens + kPrototypeRows - 1) / kPrototypeRows;
  at::parallel_for(0, batch * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(kPrototypeRows * (padded + rows)));
    std::vector<float> result(static_cast<size_t>(kPrototypeRows * wide));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / tiles, first = i % tiles * kPrototypeRows;
      const int64_t count = std::min(kPrototypeRows, tokens - first);
      kernels.mix({x.const_data_ptr<float>() + sample * x.stride(0) + first * x.stride(1), x.stride(1), x.stride(2), count,
                   heads, width, prototypes, packed.const_data_ptr<float>() + sample * heads * width * padded,
                   factors.const_data_ptr<float>(), blocks.const_data_ptr<float>() + sample * rows * wide,
                   start.const_data_ptr<float>(), columns, result.data()},
                  scratch.data());
      float* target = out.data_ptr<float>() + (sample * tokens + first) * columns;
      for (int64_t r = 0; r < count; ++r) std::copy_n(result.data() + r * wide, columns, target + r * columns);
    }
  });
  return out.to(q.scalar_type());
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("prototype_attention", &prototype_attention); }

}  // namespace
}  // namespace planmill
