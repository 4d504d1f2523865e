// head_covariance on the CPU: blocks of tokens are normalised head by head, taken relative to a pivot near their mean, and
// multiplied pair by pair; what the pivot is off is taken out at the end.
#include "common/torch_headers.h"

#include <memory>
#include <string_view>
#include <utility>

#include "common/cpu_capability.h"
#include "moments/head_covariance.h"

namespace planmill {
namespace {

constexpr int64_t kBlock = 256;  // tokens: two heads of 128 channels lie in the second-level cache
constexpr float kEpsilon = 1e-12f;

const HeadCovarianceKernels& head_kernels() {
  return choose_kernels(head_covariance_baseline(), head_covariance_avx2(), head_covariance_avx512());
}

using Pairs = std::vector<std::pair<int64_t, int64_t>>;

Pairs pairs_of(int64_t heads, std::string_view pairing) {
  Pairs pairs;
  for (int64_t i = 0; i < heads; ++i)
    for (int64_t j = i + 1; j < heads; ++j)
      if (pairing == "all" || (pairing == "adjacent" && j == i + 1) || (pairing == "first" && i == 0) ||
          (pairing == "halves" && i < heads / 2 && j == i + heads / 2))
        pairs.emplace_back(i, j);
  return pairs;
}

struct Problem {
  const float *weight, *bias;  // null: tokens are not normalised
  float eps;
  bool scalar, channel, normalize;
  int64_t tokens, heads, d;
};

class Image {
 public:
  Image(const HeadCovarianceKernels& kernels, const Problem& problem, const Pairs& pairs)
      : kernels_(kernels),
        problem_(problem),
        pairs_(pairs),
        padded_((problem.d + kernels.vector - 1) / kernels.vector * kernels.vector),
        stride_(padded_ / 16 % 2 == 1 ? padded_ : padded_ + 16),  // an odd number of cache lines: no two rows in one set
        rows_(std::make_unique_for_overwrite<float[]>(
            static_cast<size_t>(problem.heads * std::min(kBlock, problem.tokens) * stride_))),
        products_(std::make_unique_for_overwrite<float[]>(pairs.size() * static_cast<size_t>(problem.d * padded_))),
        pivots_(static_cast<size_t>(problem.heads * padded_)),
        sums_(static_cast<size_t>(problem.heads * padded_)),
        totals_(static_cast<size_t>(problem.heads * padded_)) {}

  // x [tokens, heads, d], out [pairs, d, d]
  void find(const float* x, float* out) {
    std::fill(totals_.begin(), totals_.end(), 0.0);
    const int64_t tokens = problem_.tokens, blocks = (tokens + kBlock - 1) / kBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = tokens * b / blocks, count = tokens * (b + 1) / blocks - first;
      at::parallel_for(0, problem_.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t q = begin; q < end; ++q)
          prepare(q, x + (first * problem_.heads + q) * problem_.d, count, b == 0);
      });
      multiply(count, b > 0);
    }
    at::parallel_for(0, static_cast<int64_t>(pairs_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) finish(p, out + p * problem_.d * problem_.d);
    });
  }

 private:
  float* rows(int64_t head) { return rows_.get() + head * std::min(kBlock, problem_.tokens) * stride_; }

  // Tokens of one head relative to its pivot, which the first block chooses, and their sums.
  void prepare(int64_t head, const float* x, int64_t count, bool choose) {
    float* z = rows(head);
    kernels_.normalise(x, problem_.heads * problem_.d, count, problem_.d, problem_.weight, problem_.bias, problem_.eps, z,
                       stride_);
    if (!problem_.scalar && !problem_.channel) return;
    float* pivot = pivots_.data() + head * padded_;
    float* sums = sums_.data() + head * padded_;
    double* totals = totals_.data() + head * padded_;
    if (choose) {
      std::copy(z, z + padded_, pivot);  // a channel that is constant is then exactly zero
      kernels_.sum(z, count, stride_, padded_, pivot, false, sums);
      double mean = 0.0;
      for (int64_t c = 0; c < problem_.d; ++c) {
        pivot[c] += sums[c] / static_cast<float>(count);
        mean += pivot[c];
      }
      if (problem_.scalar) std::fill(pivot, pivot + problem_.d, static_cast<float>(mean / static_cast<double>(problem_.d)));
    }
    kernels_.sum(z, count, stride_, padded_, pivot, true, sums);
    for (int64_t c = 0; c < padded_; ++c) totals[c] += sums[c];
  }

  void multiply(int64_t count, bool add) {
    const int64_t chunks = (problem_.d + kProductChunk - 1) / kProductChunk;
    at::parallel_for(0, static_cast<int64_t>(pairs_.size()) * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto [i, j] = pairs_[static_cast<size_t>(t / chunks)];
        const int64_t first = t % chunks * kProductChunk;
        kernels_.multiply(rows(i), rows(j), count, stride_, first, std::min(kProductChunk, problem_.d - first), padded_,
                          products_.get() + (t / chunks * problem_.d + first) * padded_, add);
      }
    });
  }

  // Mean of a head's channels relative to the pivot, and what takes the centre out: minus that mean, or its own mean.
  void centre(int64_t head, float* mean, float* offset) const {
    const double* totals = totals_.data() + head * padded_;
    double all = 0.0;
    for (int64_t c = 0; c < problem_.d; ++c) {
      mean[c] = static_cast<float>(totals[c] / static_cast<double>(problem_.tokens));
      all += totals[c] / static_cast<double>(problem_.tokens);
    }
    for (int64_t c = 0; c < problem_.d; ++c)
      offset[c] = problem_.scalar ? static_cast<float>(-all / static_cast<double>(problem_.d)) : -mean[c];
  }

  void finish(int64_t p, float* out) {
    const auto [i, j] = pairs_[static_cast<size_t>(p)];
    const auto size = static_cast<size_t>(padded_);
    std::vector<float> own(6 * size, 0.0f);
    float *left_mean = own.data(), *left = left_mean + size, *right_mean = left + size, *right = right_mean + size;
    float *squares = right + size, *scale = squares + size;
    const bool centred = problem_.scalar || problem_.channel;
    if (centred) {
      centre(i, left_mean, left);
      centre(j, right_mean, right);
      for (size_t c = 0; c < size; ++c) right_mean[c] += right[c];
    }
    float* c = products_.get() + p * problem_.d * padded_;
    kernels_.finish(c, problem_.d, padded_, 1.0f / static_cast<float>(problem_.tokens), centred ? left_mean : nullptr, left,
                    right, right_mean, squares);
    for (int64_t k = 0; k < padded_; ++k) scale[k] = problem_.normalize ? inverse_length(c + k, squares[k]) : 1.0f;
    kernels_.store(c, problem_.d, padded_, scale, out);
  }

  float inverse_length(const float* column, float square) const {
    float length = std::sqrt(square);
    if (std::isinf(square)) {  // squares left float32's range; the lengths need not
      double exact = 0.0;
      for (int64_t r = 0; r < problem_.d; ++r) exact += static_cast<double>(column[r * padded_]) * column[r * padded_];
      return static_cast<float>(1.0 / std::sqrt(exact));
    }
    if (length < kEpsilon) length = kEpsilon;  // NaN stays
    return 1.0f / length;
  }

  const HeadCovarianceKernels& kernels_;
  const Problem& problem_;
  const Pairs& pairs_;
  int64_t padded_, stride_;
  std::unique_ptr<float[]> rows_, products_;
  std::vector<float> pivots_, sums_;
  std::vector<double> totals_;
};

at::Tensor head_covariance(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t heads, double eps,
                           std::string_view centering, std::string_view pairing, bool interleaved, bool normalize) {
  const int64_t batch = x.size(0), tokens = x.size(1), d = x.size(2) / heads;
  const Pairs pairs = pairs_of(heads, pairing);
  const auto count = static_cast<int64_t>(pairs.size());
  at::Tensor out = at::empty({batch, count, d, d}, x.options().dtype(at::kFloat));
  if (tokens == 0) return out.zero_();
  if (out.numel() == 0) return out;
  const at::Tensor split = interleaved ? x.unflatten(2, {d, heads}).transpose(2, 3) : x.unflatten(2, {heads, d});
  const at::Tensor tidy = split.to(at::kFloat).contiguous();
  const at::Tensor w = weight.contiguous(), b = bias.contiguous();
  const bool normed = w.numel() > 0;
  const Problem problem{normed ? w.const_data_ptr<float>() : nullptr, normed ? b.const_data_ptr<float>() : nullptr,
                        static_cast<float>(eps), centering == "scalar", centering == "channel", normalize, tokens, heads, d};
  const HeadCovarianceKernels& kernels = head_kernels();
  const float* source = tidy.const_data_ptr<float>();
  float* target = out.data_ptr<float>();
  const auto run = [&](int64_t begin, int64_t end) {
    Image image(kernels, problem, pairs);
    for (int64_t i = begin; i < end; ++i) image.find(source + i * tokens * heads * d, target + i * count * d * d);
  };
  if (batch >= at::get_num_threads()) at::parallel_for(0, batch, 1, run);
  else run(0, batch);
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("head_covariance", &head_covariance); }

}  // namespace
}  // namespace planmill
