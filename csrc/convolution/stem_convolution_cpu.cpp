// stem_convolution on the CPU: blocks of rows of the result, each from the image to the pooled rows on one thread.
#include "common/torch_headers.h"

#include <atomic>
#include <string_view>

#include "common/cpu_capability.h"
#include "common/element_of.h"
#include "convolution/stem.h"

namespace planmill {
namespace {

constexpr int64_t kStripBytes = 96 << 10;  // of a block's padded rows: the second-level cache holds the rest of its work too
constexpr int64_t kLeastRows = 8;          // of a block: what two blocks share of overlapping windows is computed twice
constexpr int64_t kLeastWork = 1 << 18;    // multiplications that are worth another thread

int64_t whole(int64_t n, int64_t size) { return (n + size - 1) / size; }

StemPooling pooling_of(std::string_view name) {
  if (name == "none") return StemPooling::kNone;
  if (name == "max") return StemPooling::kMax;
  TORCH_CHECK_VALUE(name == "average", "stem_convolution: pooling must be none, max or average, got ", name);
  return StemPooling::kAverage;
}

bool is_relu(std::string_view activation) {
  TORCH_CHECK_VALUE(activation == "none" || activation == "relu",
                    "stem_convolution: activation must be none or relu, got ", activation);
  return activation == "relu";
}

// Rows of the padded image under `rows` rows of the result.
int64_t rows_under(const StemConvolution& conv, int64_t rows) {
  const int64_t pooled = std::min((rows - 1) * conv.pool_stride + conv.pool_size, conv.conv_height);
  return (pooled - 1) * conv.stride + conv.kernel_height;
}

// Rows of a block: as many blocks for each thread.
int64_t rows_of_a_block(const StemConvolution& conv, int64_t images) {
  const int64_t bytes = conv.channels * conv.strip_width * sizeof(float), threads = at::get_num_threads();
  const int64_t step = conv.pool_stride * conv.stride, fit = kStripBytes / bytes - rows_under(conv, 1);
  int64_t blocks = whole(conv.out_height, std::max(kLeastRows, fit / step + 1));
  if (images % threads != 0) blocks = whole(blocks, threads) * threads;
  return whole(conv.out_height, std::min(blocks, conv.out_height));
}

at::Tensor stem_convolution(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias, int64_t stride,
                            int64_t padding, std::string_view activation, std::string_view pooling, int64_t pool_size,
                            int64_t pool_stride, int64_t pool_padding, bool count_include_pad) {
  const at::Tensor panels = packed.contiguous(), shift = bias.contiguous();
  const int64_t images = x.size(0), outputs = shift.size(0), below = panels.size(2), beside = panels.size(3);
  const auto convolved = [&](int64_t n, int64_t taps) { return (n + 2 * padding - taps) / stride + 1; };
  const auto pooled = [&](int64_t n) { return (n + 2 * pool_padding - pool_size) / pool_stride + 1; };
  StemConvolution conv{.type = element_of(x),
                       .x = x.const_data_ptr(),
                       .image_step = x.stride(0),
                       .channel_step = x.stride(1),
                       .row_step = x.stride(2),
                       .column_step = x.stride(3),
                       .height = x.size(2),
                       .width = x.size(3),
                       .channels = x.size(1),
                       .packed = panels.const_data_ptr<float>(),
                       .outputs = outputs,
                       .kernel_height = below,
                       .kernel_width = beside,
                       .stride = stride,
                       .padding = padding,
                       .conv_height = convolved(x.size(2), below),
                       .conv_width = convolved(x.size(3), beside),
                       .relu = is_relu(activation),
                       .pooling = pooling_of(pooling),
                       .pool_size = pool_size,
                       .pool_stride = pool_stride,
                       .pool_padding = pool_padding,
                       .count_padding = count_include_pad};
  conv.out_height = pooled(conv.conv_height), conv.out_width = pooled(conv.conv_width);
  at::Tensor out = at::empty({images, conv.out_height, conv.out_width, outputs}, x.options());
  if (out.numel() == 0) return out;
  conv.out = out.mutable_data_ptr();
  std::vector<float> shifts(panels.size(0) * kStemPanel, 0.0f);
  std::copy_n(shift.const_data_ptr<float>(), outputs, shifts.begin());
  conv.bias = shifts.data();
  conv.strip_width = (conv.conv_width - 1) * stride + beside;
  const int64_t block = rows_of_a_block(conv, images), blocks = whole(conv.out_height, block);
  conv.strip_rows = rows_under(conv, block);
  std::vector<int64_t> taps;
  for (int64_t c = 0; c < conv.channels; ++c)
    for (int64_t i = 0; i < below; ++i)
      for (int64_t j = 0; j < beside; ++j) taps.push_back((c * conv.strip_rows + i) * conv.strip_width + j);
  conv.taps = taps.data();
  const StemKernels& kernels = choose_kernels(stem_baseline(), stem_avx2(), stem_avx512());
  const int64_t work = block * conv.conv_width * outputs * static_cast<int64_t>(taps.size()), count = images * blocks;
  const int64_t workers = std::clamp<int64_t>(count * work / kLeastWork, 1, std::min<int64_t>(count, at::get_num_threads()));
  std::atomic<int64_t> next{0};  // whoever has finished a block takes the next one
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const at::Tensor scratch = at::empty({kernels.scratch(conv)}, at::kFloat);
    for (int64_t i = next++; i < count; i = next++) {
      const int64_t first = i % blocks * block;
      kernels.run(conv, i / blocks, first, std::min(conv.out_height, first + block), scratch.mutable_data_ptr<float>());
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("stem_convolution", &stem_convolution); }

}  // namespace
}  // namespace planmill
