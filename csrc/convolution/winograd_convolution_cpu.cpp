// winograd_convolution on the CPU: blocks of tiles, each from its input to its output on one thread.
#include "common/torch_headers.h"

#include "common/cpu_capability.h"
#include "common/element_of.h"
#include "convolution/winograd.h"

namespace planmill {
namespace {

int64_t groups(int64_t n, int64_t size) { return (n + size - 1) / size; }

at::Tensor winograd_convolution(const at::Tensor& x, const at::Tensor& transformed, const at::Tensor& bias, int64_t size,
                                int64_t padding) {
  const at::Tensor u = x.contiguous(), kernel = transformed.contiguous(), shift = bias.to(at::kFloat).contiguous();
  const int64_t images = u.size(0), height = u.size(1), width = u.size(2), side = 7 - size;
  const int64_t out_height = height + 2 * padding - size + 1, out_width = width + 2 * padding - size + 1;
  const int64_t outputs = shift.size(0);
  at::Tensor out = at::empty({images, out_height, out_width, outputs}, u.options());
  if (out.numel() == 0) return out;
  const WinogradKernels& kernels = choose_kernels(winograd_baseline(), winograd_avx2(), winograd_avx512());
  const WinogradConvolution convolution{element_of(u), u.const_data_ptr(), height, width, u.size(3),
                                        kernel.const_data_ptr<float>(),
                                        shift.const_data_ptr<float>(),
                                        out.mutable_data_ptr(), out_height, out_width, outputs, size, padding,
                                        groups(out_height, side), groups(out_width, side)};
  const int64_t tiles = images * convolution.tile_rows * convolution.tile_columns;
  // Blocks of one size, as many for each thread; whole register tiles where there are enough.
  constexpr int64_t kRows = 12;
  const int64_t threads = at::get_num_threads(), most = kernels.block(convolution);
  const int64_t blocks = groups(groups(tiles, most), threads) * threads, even = groups(tiles, std::min(blocks, tiles));
  const int64_t block = even > kRows ? groups(even, kRows / 2) * (kRows / 2) : even;
  at::parallel_for(0, groups(tiles, block), 1, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({kernels.scratch(convolution)}, at::kFloat);
    for (int64_t i = begin; i < end; ++i)
      kernels.run(convolution, i * block, std::min(tiles, (i + 1) * block), scratch.mutable_data_ptr<float>());
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("winograd_convolution", &winograd_convolution); }

}  // namespace
}  // namespace planmill
