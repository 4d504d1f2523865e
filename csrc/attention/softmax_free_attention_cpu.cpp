// softmax_free_attention on the CPU in four passes over (head, part): landmarks, W = Cm^T V by chunks of queries, the small
// inverse, Y = Cm U. What is summed in which order depends on the sizes of a head alone, not on batch or threads.
#include "common/torch_headers.h"

#include "attention/softmax_free_attention.h"
#include "common/cpu_capability.h"
#include "common/element_of.h"

namespace planmill {
namespace {

constexpr int64_t kChunk = 1056;      // queries of a partial sum of W: whole tiles
constexpr int64_t kScatterRows = 288;  // queries of a part of the last pass: whole tiles
constexpr float kLargestNorm = 1.01f;

const SoftKernels& soft_kernels() {
  return choose_kernels(softmax_free_attention_baseline(), softmax_free_attention_avx2(), softmax_free_attention_avx512());
}

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

at::Tensor with_unit_columns(const at::Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

struct Options {
  float scale, ridge;
  bool newton, normalize, coupled;
  int64_t iterations;
};

// Everything of one call: the heads' landmarks, partial sums and inverses.
class Soft {
 public:
  Soft(const at::Tensor& q, const at::Tensor& v, const at::Tensor& landmarks, const Options& options)
      : kernels_(soft_kernels()), q_(with_unit_columns(q)), v_(with_unit_columns(v)), options_(options),
        landmarks_(landmarks.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous()), heads_(q.size(0) * q.size(1)),
        tokens_(q.size(2)), m_(landmarks.size(2)), d_(q.size(3)), dv_(v.size(3)),
        ld_(blocks(m_, kernels_.width) * kernels_.width), ldv_(blocks(dv_, kernels_.width) * kernels_.width),
        chunk_(std::max(kChunk, blocks(4 * m_, kSoftTile) * kSoftTile)), chunks_(blocks(tokens_, chunk_)),
        inverse_{m_, ld_, ldv_, options.normalize, options.newton ? options.iterations : -1} {
    if (ld_ % 256 == 0) ld_ += kernels_.width, inverse_.ld = ld_;  // rows of one column in the same few lines of the cache
    prepared_.resize(static_cast<size_t>(heads_ * per_head()));
    sums_.resize(static_cast<size_t>(heads_ * chunks_ * m_ * ldv_));
  }

  at::Tensor run() {
    at::Tensor out = at::empty(v_.sizes(), v_.options().memory_format(at::MemoryFormat::Contiguous));
    for_each(heads_, [&](int64_t h, float*) { prepare(h); });
    for_each(heads_ * chunks_, [&](int64_t i, float* scratch) {
      const int64_t h = i / chunks_, first = i % chunks_ * chunk_;
      kernels_.gather(head(h), first, std::min(first + chunk_, tokens_), partial(h, i % chunks_), scratch);
    });
    invert_all();
    const int64_t parts = blocks(tokens_, kScatterRows);
    auto* target = static_cast<char*>(out.data_ptr());
    for_each(heads_ * parts, [&](int64_t i, float* scratch) {
      const int64_t h = i / parts, first = i % parts * kScatterRows;
      void* rows = target + (h * tokens_ + first) * dv_ * out.element_size();
      kernels_.scatter(head(h), first, std::min(first + kScatterRows, tokens_), partial(h, 0), rows, scratch);
    });
    return out;
  }

 private:
  // Runs what(i, scratch) for each i < count; scratch is the thread's own.
  template <class What>
  void for_each(int64_t count, const What& what, int64_t scratch = 0) const {
    const int64_t size = scratch > 0 ? scratch : soft_scratch(head(0));
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> own(static_cast<size_t>(size));
      for (int64_t i = begin; i < end; ++i) what(i, own.data());
    });
  }

  int64_t per_head() const { return d_ + (d_ + 1) * ld_; }
  float* partial(int64_t h, int64_t chunk) { return sums_.data() + (h * chunks_ + chunk) * m_ * ldv_; }

  SoftHead head(int64_t h) const {
    const int64_t b = h / q_.size(1), own = h % q_.size(1);
    const auto at_head = [&](const at::Tensor& x) {
      return static_cast<const char*>(x.const_data_ptr()) + (b * x.stride(0) + own * x.stride(1)) * x.element_size();
    };
    const float* prepared = prepared_.data() + h * per_head();
    return {at_head(q_), at_head(v_), element_of(q_), q_.stride(2), v_.stride(2), m_, d_, dv_, ld_, ldv_, options_.scale,
            prepared, landmarks_.const_data_ptr<float>() + h * m_ * d_, prepared + d_, prepared + d_ + d_ * ld_};
  }

  void prepare(int64_t h) {
    float* prepared = prepared_.data() + h * per_head();
    kernels_.prepare(landmarks_.data_ptr<float>() + h * m_ * d_, m_, d_, ld_, prepared, prepared + d_,
                     prepared + d_ + d_ * ld_);
  }

  void invert_all() {
    const int64_t size = m_ * ld_, all = size + m_ + soft_inverse_scratch(inverse_);
    float shared = 0.0f;
    if (options_.coupled) shared = shared_step(all);
    for_each(heads_, [&](int64_t h, float* scratch) {
      float *p = scratch, *sums = p + size, *rest = sums + m_, *w = partial(h, 0);
      for (int64_t c = 1; c < chunks_; ++c)
        for (int64_t i = 0; i < m_ * ldv_; ++i) w[i] += partial(h, c)[i];
      const float rho = kernels_.gram(head(h), options_.ridge, p, sums);
      float alpha = options_.coupled ? shared : (options_.normalize ? 2.0f : 1.8f) / (rho * rho);
      if (options_.newton && options_.normalize && !options_.coupled) {
        float norms[kSoftHalvings + 1];
        kernels_.step_norms(inverse_, p, alpha, norms, rest);
        alpha = halve(alpha, norms);
      }
      kernels_.invert(inverse_, p, sums, alpha, w, rest);
    }, all);
  }

  static float halve(float alpha, const float* norms) {
    for (int64_t k = 0; k < kSoftHalvings && norms[k] > kLargestNorm; ++k) alpha *= 0.5f;
    return alpha;
  }

  // Newton's first step where the whole batch has one: every P is made once more for the norms, instead of being kept.
  float shared_step(int64_t scratch_size) {
    constexpr int64_t kNorms = kSoftHalvings + 1;
    std::vector<float> found(static_cast<size_t>(heads_ * kNorms));
    const int64_t size = m_ * ld_;
    for_each(heads_, [&](int64_t h, float* s) { found[h] = kernels_.gram(head(h), options_.ridge, s, s + size); }, scratch_size);
    float rho = 0.0f;
    for (int64_t h = 0; h < heads_; ++h)
      if (!(found[h] <= rho) && !std::isnan(rho)) rho = found[h];
    const float alpha = 2.0f / (rho * rho);
    for_each(heads_, [&](int64_t h, float* s) {
      kernels_.gram(head(h), options_.ridge, s, s + size);
      kernels_.step_norms(inverse_, s, alpha, found.data() + h * kNorms, s + size + m_);
    }, scratch_size);
    float norms[kNorms] = {};
    for (int64_t h = 0; h < heads_; ++h)
      for (int64_t k = 0; k < kNorms; ++k) norms[k] = std::max(norms[k], found[h * kNorms + k]);
    return halve(alpha, norms);
  }

  const SoftKernels& kernels_;
  at::Tensor q_, v_;
  Options options_;
  at::Tensor landmarks_;
  int64_t heads_, tokens_, m_, d_, dv_, ld_, ldv_, chunk_, chunks_;
  SoftInverse inverse_;
  std::vector<float> prepared_, sums_;
};

at::Tensor softmax_free_attention(const at::Tensor& q, const at::Tensor& v, const at::Tensor& landmarks, double scale,
                                  std::string_view mode, int64_t iterations, double ridge, bool normalize, bool batch_coupled) {
  if (v.numel() == 0) return at::empty(v.sizes(), v.options().memory_format(at::MemoryFormat::Contiguous));
  const Options options{static_cast<float>(scale), static_cast<float>(ridge), mode == "newton", normalize, batch_coupled, iterations};
  return Soft(q, v, landmarks, options).run();
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("softmax_free_attention", &softmax_free_attention); }

}  // namespace
}  // namespace planmill
