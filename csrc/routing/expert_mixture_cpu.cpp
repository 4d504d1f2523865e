// expert_mixture on the CPU: one pass over the assignments, sorted by expert.
//
// 1. A stable counting sort of the assignments by expert; each expert's rows are cut into blocks of nearly equal height.
// 2. First product: a task is a block of rows times a block of columns. It gathers its rows of x, packs the weights panel by
//    panel, and applies the activation to its part of the hidden rows while they are in the cache.
// 3. Second product: the same tasks over the hidden rows; results go to the row of their assignment, (t, j).
// 4. Results are weighted and summed in the order of j.
// Tasks are handed out one by one, so that unequal experts and a busy core cost little.
#include "common/torch_headers.h"

#include <ATen/ops/zeros.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "common/cpu_capability.h"
#include "routing/expert_mixture.h"

namespace planmill {
namespace {

constexpr int64_t kBlockRows = 96;               // rows of one task: packing a weight costs as much as multiplying 4 rows
constexpr int64_t kBlockColumns = 256;           // results of one task per row
constexpr int64_t kGatheredBytes = 256 << 10;    // rows of x that a task holds at once
constexpr int64_t kTiledBytes = 512 << 10;          // ... in bfloat16, for tile registers
constexpr int64_t kHiddenBytes = 16 << 20;       // hidden rows between the two products
constexpr int64_t kRowPadding = 16;               // a line: rows of results must not share their place in the cache
constexpr int64_t kTiledColumns = 1024;          // ... over tile registers, whose rows of x cost more to arrange
constexpr double kPlainWork = 1 << 19;           // multiply-adds below which other threads are not woken
constexpr int64_t kTasksPerThread = 4;

const ExpertMixtureKernels& kernels_in_use() {
  return choose_kernels(expert_mixture_baseline(), expert_mixture_avx2(),
                        expert_mixture_avx512(), expert_mixture_amx());
}

Storage storage_of(const at::Tensor& x) {
  if (x.scalar_type() == at::kFloat) return Storage::kFloat;
  return x.scalar_type() == at::kBFloat16 ? Storage::kBFloat16 : Storage::kHalf;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of numbers of one storage type.
struct Rows {
  const char* data = nullptr;
  Storage storage = Storage::kFloat;
  int64_t bytes = 4;   // of a number
  int64_t stride = 0;  // numbers from row to row

  Rows() = default;
  Rows(const at::Tensor& x, int64_t row_stride)
      : data(static_cast<const char*>(x.const_data_ptr())), storage(storage_of(x)), bytes(x.element_size()),
        stride(row_stride) {}
  explicit Rows(const float* x, int64_t row_stride) : data(reinterpret_cast<const char*>(x)), stride(row_stride) {}
  const char* at(int64_t row, int64_t column = 0) const { return data + (row * stride + column) * bytes; }
};

// The weights [E, N, K] and biases [E, N] of one product; the last dimension of the weights is dense.
struct Layer {
  at::Tensor weight, bias;
  Rows rows;
  int64_t expert_stride, k;

  Layer(const at::Tensor& w, const at::Tensor& b)
      : weight(w.stride(2) == 1 ? w : w.contiguous()), bias(b.contiguous()), rows(weight, weight.stride(1)),
        expert_stride(weight.stride(0)), k(w.size(2)) {}
  Rows of(int64_t expert) const {
    Rows own = rows;
    own.data += expert * expert_stride * rows.bytes;
    return own;
  }
};

// Buffers of one thread, kept from call to call; at most about a megabyte.
class Scratch {
 public:
  float* get(int which, int64_t size) {
    std::vector<float>& buffer = buffers_[which];
    if (static_cast<int64_t>(buffer.size()) < size + 16) buffer.resize(static_cast<size_t>(size + 16));
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<float> buffers_[4];
};

Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

// Columns [first, first + count) of a weight matrix, whose results go to z + offset.
struct Span {
  int64_t first, count, offset;
};

// z[i][offset + c] = sum_k x_i[k] w[first + c][k]: sums over blocks of channels, then over the blocks. `gather(i, begin, n,
// out)` writes channels [begin, begin + n) of row i.
template <class Gather>
void multiply_spans(const ExpertMixtureKernels& kernels, const Gather& gather, int64_t rows, const Rows& w, int64_t k,
                    const Span* spans, int count, float* z, int64_t ldz) {
  if (k == 0) std::fill(z, z + rows * ldz, 0.0f);
  const int64_t blocks = (k + kChannelBlock - 1) / kChannelBlock;
  const int64_t size = blocks == 0 ? 0 : round_up((k + blocks - 1) / blocks, 8);
  const int64_t held = std::max<int64_t>(1, kGatheredBytes / (rows * kChannelBlock * 4));
  float* x = scratch().get(0, std::min(held, blocks) * rows * kChannelBlock);
  float* panel = scratch().get(1, kernels.panel_width * kChannelBlock);
  for (int64_t group = 0; group < blocks; group += held) {
    const int64_t stop = std::min(blocks, group + held);
    for (int64_t block = group; block < stop; ++block)
      for (int64_t i = 0; i < rows; ++i)
        gather(i, block * size, std::min(size, k - block * size), x + ((block - group) * rows + i) * kChannelBlock);
    for (int s = 0; s < count; ++s)
      for (int64_t c = 0; c < spans[s].count; c += kernels.panel_width) {
        const int64_t width = std::min(kernels.panel_width, spans[s].count - c);
        int64_t next = -1;  // the row of w that a full panel after this one starts with
        if (c + 2 * kernels.panel_width <= spans[s].count) next = spans[s].first + c + kernels.panel_width;
        else if (s + 1 < count && spans[s + 1].count >= kernels.panel_width) next = spans[s + 1].first;
        for (int64_t block = group; block < stop; ++block) {
          const int64_t begin = block * size, channels = std::min(size, k - begin);
          const char* ahead = next < 0 ? nullptr : w.at(next, begin);
          const char* own = w.at(spans[s].first + c, begin);
          const float* rows_of_x = x + (block - group) * rows * kChannelBlock;
          float* out = z + spans[s].offset + c;
          if (rows <= kernels.stream_rows && width == kernels.panel_width) {
            kernels.stream(own, w.storage, w.stride, channels, rows_of_x, rows, out, ldz, block == 0, ahead);
            continue;
          }
          kernels.pack(own, w.storage, w.stride, width, channels, panel);
          kernels.multiply(rows_of_x, rows, panel, channels, out, ldz, block == 0, ahead, w.stride * w.bytes,
                           channels * w.bytes);
        }
      }
  }
}

bool tiled(const ExpertMixtureKernels& kernels, const Rows& w) {
  return kernels.tiles.multiply != nullptr && w.storage == Storage::kBFloat16;
}

// The same over tile registers, for every number of rows: x is rounded to bfloat16, so that nothing else has these bits.
template <class Gather>
void multiply_tiled(const ExpertMixtureKernels& kernels, const Gather& gather, int64_t rows, const Rows& w, int64_t k,
                    const Span* spans, int count, float* z, int64_t ldz) {
  if (k == 0) std::fill(z, z + rows * ldz, 0.0f);
  const int64_t padded = round_up(rows, 32);
  const int64_t held = std::max<int64_t>(1, kTiledBytes / (padded * kChannelBlock * 2)) * kChannelBlock;
  float* x = scratch().get(0, rows * kChannelBlock);
  auto* tiles = reinterpret_cast<uint32_t*>(scratch().get(1, padded * std::min(held, round_up(k, 32)) / 2));
  TileState before;
  kernels.tiles.start(&before);
  for (int64_t first = 0; first < k; first += held) {
    const int64_t channels = std::min(held, k - first), steps = (channels + 31) / 32;
    for (int64_t c = 0; c < channels; c += kChannelBlock) {
      const int64_t n = std::min(kChannelBlock, channels - c);
      for (int64_t i = 0; i < rows; ++i) gather(i, first + c, n, x + i * kChannelBlock);
      kernels.tiles.arrange(x, kChannelBlock, rows, n, c / 32, steps, tiles);
    }
    for (int s = 0; s < count; ++s)
      for (int64_t c = 0; c < spans[s].count; c += kernels.panel_width) {
        const int64_t width = std::min(kernels.panel_width, spans[s].count - c);
        const bool more = c + 2 * kernels.panel_width <= spans[s].count;
        const char* next = more ? w.at(spans[s].first + c + kernels.panel_width, first) : nullptr;
        kernels.tiles.multiply(w.at(spans[s].first + c, first), w.stride, width, tiles, rows, channels,
                               z + spans[s].offset + c, ldz, first == 0, next);
      }
  }
  kernels.tiles.stop(&before);
}

struct Block {
  int64_t expert, first, rows;  // rows [first, first + rows) of the sorted assignments
};

class Mixture {
 public:
  Mixture(const at::Tensor& x, const at::Tensor& indices, const at::Tensor& weights, const at::Tensor& up,
          const at::Tensor& up_bias, const at::Tensor& down, const at::Tensor& down_bias, std::string_view activation,
          bool weight_on_input)
      : kernels_(kernels_in_use()), x_(x.stride(1) == 1 ? x : x.contiguous()), indices_(indices.contiguous()),
        weights_(weights.contiguous()), up_(up, up_bias), down_(down, down_bias), weight_on_input_(weight_on_input) {
    input_ = Rows(x_, x_.stride(0));
    index_ = indices_.const_data_ptr<int32_t>();
    weight_ = weights_.const_data_ptr<float>();
    tokens_ = x.size(0), k_ = indices.size(1), experts_ = down.size(0), outputs_ = down.size(1), hidden_ = down.size(2);
    gated_ = up.size(1) != hidden_;
    tiled_ = tiled(kernels_, up_.rows);
    most_columns_ = tiled_ ? kTiledColumns : kBlockColumns;
    kind_ = activation == "silu" ? Activation::kSilu : activation == "gelu" ? Activation::kGelu
            : activation == "gelu_tanh" ? Activation::kGeluTanh : Activation::kRelu;
    sort();
  }

  at::Tensor run() {
    at::Tensor out = at::zeros({tokens_, outputs_}, at::kFloat);
    if (out.numel() == 0 || order_.empty()) return out.to(x_.scalar_type());
    const int64_t width = kernels_.panel_width, hidden_stride = round_up(hidden_, width);
    result_stride_ = round_up(outputs_, width);
    at::Tensor result = at::empty({tokens_ * k_, result_stride_}, at::kFloat);
    result_ = result.data_ptr<float>();
    const int64_t most = std::max<int64_t>(kBlockRows, kHiddenBytes / std::max<int64_t>(4, 4 * hidden_stride));
    at::Tensor hidden = at::empty({std::min<int64_t>(most, std::ssize(order_)), hidden_stride}, at::kFloat);
    hidden_rows_ = hidden.data_ptr<float>();
    hidden_stride_ = hidden_stride;
    for (size_t first = 0, last = 0; first < blocks_.size(); first = last) {
      chunk_ = blocks_[first].first;
      while (last < blocks_.size() && blocks_[last].first + blocks_[last].rows - chunk_ <= most) ++last;
      each_part(first, last, hidden_, gated_ ? 2 : 1, up_.k, &Mixture::run_up);
      each_part(first, last, outputs_, 1, hidden_, &Mixture::run_down);
    }
    combine(out.data_ptr<float>());
    return out.to(x_.scalar_type());
  }

 private:
  void sort();
  void run_up(const Block& block, int64_t first, int64_t count) const;
  void run_down(const Block& block, int64_t first, int64_t count) const;
  void combine(float* out) const;
  template <class Part>
  void each_part(size_t first, size_t last, int64_t columns, int64_t matrices, int64_t k, Part part) const;
  template <class Gather>
  void multiply_any(const Gather& gather, int64_t rows, const Rows& w, int64_t k, const Span* spans, int count, float* z,
                    int64_t ldz) const {
    if (tiled_) multiply_tiled(kernels_, gather, rows, w, k, spans, count, z, ldz);
    else multiply_spans(kernels_, gather, rows, w, k, spans, count, z, ldz);
  }
  const float* bias_of(const Layer& layer, int64_t expert, int64_t first, int64_t count, int which) const;

  const ExpertMixtureKernels& kernels_;
  at::Tensor x_, indices_, weights_;
  Layer up_, down_;
  Rows input_;
  const int32_t* index_;
  const float* weight_;
  int64_t tokens_, k_, experts_, outputs_, hidden_;
  int64_t most_columns_;  // of a task
  bool gated_, weight_on_input_, tiled_;
  Activation kind_;
  std::vector<int32_t> order_;  // assignments t * k + j by expert
  std::vector<Block> blocks_;
  float *hidden_rows_ = nullptr, *result_ = nullptr;
  int64_t hidden_stride_ = 0, result_stride_ = 0;
  int64_t chunk_ = 0;  // sorted row that stands first in hidden_rows_
};

void Mixture::sort() {
  std::vector<int64_t> start(static_cast<size_t>(experts_ + 1));
  const int64_t assignments = tokens_ * k_;
  for (int64_t a = 0; a < assignments; ++a) {
    const int32_t expert = index_[a];
    TORCH_CHECK_VALUE(expert >= -1 && expert < experts_, "expert_mixture: indices must be -1 or below E = ", experts_,
                      ", got ", expert);
    if (expert >= 0) ++start[expert + 1];
  }
  for (int64_t e = 0; e < experts_; ++e) {
    const int64_t rows = start[e + 1], parts = (rows + kBlockRows - 1) / kBlockRows;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
      blocks_.push_back({e, start[e] + first, last - first});
    }
    start[e + 1] += start[e];
  }
  order_.resize(static_cast<size_t>(start[experts_]));
  for (int64_t a = 0; a < assignments; ++a)
    if (index_[a] >= 0) order_[start[index_[a]]++] = static_cast<int32_t>(a);
}

// Calls part(block, first column, columns) for every block and block of columns, in any order, on all threads.
template <class Part>
void Mixture::each_part(size_t first, size_t last, int64_t columns, int64_t matrices, int64_t k, Part part) const {
  const int64_t blocks = static_cast<int64_t>(last - first), threads = at::get_num_threads();
  const int64_t rows = blocks_[last - 1].first + blocks_[last - 1].rows - blocks_[first].first;
  const int64_t even = blocks * columns / (threads * kTasksPerThread) + 1;
  const int64_t size = round_up(std::clamp<int64_t>(even, 1, most_columns_ / matrices), kernels_.panel_width);
  const int64_t parts = (columns + size - 1) / size;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < blocks * parts;) {
      const int64_t column = task % parts * size;
      (this->*part)(blocks_[first + static_cast<size_t>(task / parts)], column, std::min(size, columns - column));
    }
  };
  const double cost = static_cast<double>(rows) * static_cast<double>(columns * matrices) * static_cast<double>(k);
  if (cost < kPlainWork) work(0, 1);
  else at::parallel_for(0, threads, 1, work);
}

// Part of an expert's bias, as float32 and padded to whole panels; null where there is none.
const float* Mixture::bias_of(const Layer& layer, int64_t expert, int64_t first, int64_t count, int which) const {
  if (layer.bias.numel() == 0) return nullptr;
  const int64_t size = kTiledColumns + kernels_.panel_width;
  float* out = scratch().get(2, 2 * size) + which * size;
  const Rows rows(layer.bias, layer.bias.size(1));
  kernels_.load_row(rows.at(expert, first), rows.storage, count, 1.0f, out);
  std::fill(out + count, out + round_up(count, kernels_.panel_width), 0.0f);
  return out;
}

void Mixture::run_up(const Block& block, int64_t first, int64_t count) const {
  const int64_t width = round_up(count, kernels_.panel_width), ldz = (gated_ ? 2 * width : width) + kRowPadding;
  float* z = scratch().get(3, block.rows * ldz);
  const Span spans[2] = {{first, count, 0}, {hidden_ + first, count, width}};
  const auto gather = [&](int64_t i, int64_t begin, int64_t n, float* out) {
    const int32_t a = order_[block.first + i];
    kernels_.load_row(input_.at(a / k_, begin), input_.storage, n, weight_on_input_ ? weight_[a] : 1.0f, out);
  };
  multiply_any(gather, block.rows, up_.of(block.expert), up_.k, spans, gated_ ? 2 : 1, z, ldz);
  const float* gate_bias = bias_of(up_, block.expert, first, count, 0);
  const float* up_bias = gated_ ? bias_of(up_, block.expert, hidden_ + first, count, 1) : nullptr;
  for (int64_t i = 0; i < block.rows; ++i)
    kernels_.activate(kind_, z + i * ldz, gated_ ? z + i * ldz + width : nullptr, gate_bias, up_bias, width,
                      hidden_rows_ + (block.first - chunk_ + i) * hidden_stride_ + first);
}

void Mixture::run_down(const Block& block, int64_t first, int64_t count) const {
  const int64_t ldz = round_up(count, kernels_.panel_width) + kRowPadding;
  float* z = scratch().get(3, block.rows * ldz);
  const Span span{first, count, 0};
  const auto gather = [&](int64_t i, int64_t begin, int64_t n, float* out) {
    std::memcpy(out, hidden_rows_ + (block.first - chunk_ + i) * hidden_stride_ + begin, static_cast<size_t>(n) * 4);
  };
  multiply_any(gather, block.rows, down_.of(block.expert), hidden_, &span, 1, z, ldz);
  const float* bias = bias_of(down_, block.expert, first, count, 0);
  for (int64_t i = 0; i < block.rows; ++i) {
    float* out = result_ + order_[block.first + i] * result_stride_ + first;
    std::memcpy(out, z + i * ldz, static_cast<size_t>(count) * 4);
    if (bias != nullptr) kernels_.accumulate(bias, 1.0f, count, out);
  }
}

void Mixture::combine(float* out) const {
  at::parallel_for(0, tokens_, std::max<int64_t>(1, 32768 / (k_ * outputs_)), [&](int64_t begin, int64_t end) {
    for (int64_t a = begin * k_; a < end * k_; ++a)
      if (index_[a] >= 0)
        kernels_.accumulate(result_ + a * result_stride_, weight_on_input_ ? 1.0f : weight_[a], outputs_,
                            out + a / k_ * outputs_);
  });
}

at::Tensor expert_mixture(const at::Tensor& x, const at::Tensor& indices, const at::Tensor& weights, const at::Tensor& up,
                          const at::Tensor& up_bias, const at::Tensor& down, const at::Tensor& down_bias,
                          std::string_view activation, bool weight_on_input) {
  return Mixture(x, indices, weights, up, up_bias, down, down_bias, activation, weight_on_input).run();
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("expert_mixture", &expert_mixture); }

}  // namespace
}  // namespace planmill
