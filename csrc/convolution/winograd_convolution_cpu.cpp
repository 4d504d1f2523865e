// winograd_convolution on the CPU: blocks of tiles times parts of the output channels, dealt out to the threads.
#include "common/torch_headers.h"

#include "common/cpu_capability.h"
#include "common/element_of.h"
#include "convolution/winograd.h"

namespace planmill {
namespace {

constexpr int64_t kStays = 4 << 20;       // bytes of a kernel that a thread finds in the caches at every block
constexpr int64_t kFewTiles = 48;         // of a thread, that a kernel from memory is not worth bringing for
constexpr int64_t kGroupsOfAPart = 4;     // at least: each part transforms its tiles again

int64_t whole(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Parts of the output channels, so that few tiles do not have every thread read all of a large kernel.
int64_t parts_of(const at::Tensor& kernel, int64_t tiles, int64_t threads) {
  if (threads == 1 || kernel.nbytes() <= kStays || tiles >= threads * kFewTiles) return 1;
  return std::clamp<int64_t>(whole(kernel.size(1), kWinogradGroup) / kGroupsOfAPart, 1, threads);
}

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
                                        whole(out_height, side), whole(out_width, side)};
  const int64_t tiles = images * convolution.tile_rows * convolution.tile_columns;
  // Blocks of one size, as many for each thread; whole register tiles where there are enough.
  constexpr int64_t kRows = 12;
  const int64_t threads = at::get_num_threads(), most = kernels.block(convolution);
  const int64_t parts = parts_of(kernel, tiles, threads), sharers = whole(threads, parts);
  const int64_t blocks = whole(whole(tiles, most), sharers) * sharers, even = whole(tiles, std::min(blocks, tiles));
  const int64_t block = even > kRows ? whole(even, kRows / 2) * (kRows / 2) : even;
  const int64_t panels = kernel.size(1), part = whole(whole(panels, kWinogradGroup), parts) * kWinogradGroup;
  at::parallel_for(0, whole(tiles, block) * parts, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({kernels.scratch(convolution)}, at::kFloat);
    for (int64_t i = begin; i < end;) {
      const int64_t first = i / parts * block, of = i % parts, last = std::min(parts, of + end - i);
      kernels.run(convolution, first, std::min(tiles, first + block), of * part, std::min(panels, last * part),
                  scratch.mutable_data_ptr<float>());
      i += last - of;
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("winograd_convolution", &winograd_convolution); }

}  // namespace
}  // namespace planmill
