// matrix_root on the CPU: Newton-Schulz in panels. Whole matrices to a thread where there are enough of them, otherwise the
// columns of each product are shared out: the same sums either way.
#include "common/torch_headers.h"

#include <limits>
#include <utility>

#include "common/cpu_capability.h"
#include "moments/matrix_root.h"

namespace planmill {
namespace {

const MatrixRootKernels& root_kernels() {
  return choose_kernels(matrix_root_baseline(), matrix_root_avx2(), matrix_root_avx512());
}

class Root {
 public:
  Root(const MatrixRootKernels& kernels, int64_t d)
      : kernels_(kernels), d_(d), panels_((d + kernels.panel - 1) / kernels.panel), rows_(panels_ * kernels.panel) {
    for (auto& matrix : matrices_) matrix.resize(static_cast<size_t>(rows_ * rows_));
  }

  // out [d, d] = the root of the symmetric part of s, or its inverse.
  void find(const float* s, int64_t iterations, bool inverse, float* out) {
    double trace = 0.0;
    int unknown = 0;  // whether any number is NaN or infinite
    for (int64_t r = 0; r < d_; ++r) trace += s[r * d_ + r];
    for (int64_t e = 0; e < d_ * d_; ++e) unknown |= static_cast<int>(!(std::fabs(s[e]) <= std::numeric_limits<float>::max()));
    if (unknown != 0 || trace < 0.0) {
      std::fill(out, out + d_ * d_, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    if (trace == 0.0) {
      std::fill(out, out + d_ * d_, 0.0f);
      return;
    }
    iterate(s, 0.5 / trace, iterations, inverse);
    store(static_cast<float>(inverse ? 1.0 / std::sqrt(trace) : std::sqrt(trace)), out);
  }

 private:
  using Matrix = std::vector<float>;

  // Leaves the root, or its inverse, of (s + s^T) * factor in x_.
  //
  // P = Z Y is iterated, and X, which is Y or Z: M = (3 I - P) / 2, X <- X M, P <- P M M. In exact arithmetic these are the
  // coupled steps. Half of each product is taken for the whole only because its factors commute; rounded, Y and Z of a
  // converged iteration do not, and the error of their product grows at every step. P and M are near I by then.
  void iterate(const float* s, double factor, int64_t iterations, bool inverse) {
    load(s, factor);
    set_m();
    if (inverse) *x_ = *m_;
    else multiply(*p_, *m_, *x_);
    for (int64_t step = 2; step <= iterations; ++step) {
      if (step == 2 && !inverse) {
        multiply(*x_, *m_, *p_);  // X is P M
      } else {
        multiply(*p_, *m_, *spare_);
        multiply(*spare_, *m_, *p_);
      }
      set_m();
      multiply(*x_, *m_, *spare_);
      std::swap(x_, spare_);
    }
  }

  void set_m() {
    for (size_t e = 0; e < p_->size(); ++e) (*m_)[e] = -0.5f * (*p_)[e];
    for (int64_t r = 0; r < d_; ++r) (*m_)[at(r, r)] += 1.5f;
  }

  void multiply(const Matrix& a, const Matrix& b, Matrix& c) {
    at::parallel_for(0, panels_, std::max<int64_t>(1, (1 << 17) / (d_ * rows_)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t column = t % 2 == 0 ? t / 2 : panels_ - 1 - t / 2;  // a long one with a short one
        kernels_.multiply(a.data(), b.data(), c.data(), d_, column);
      }
    });
  }

  size_t at(int64_t r, int64_t c) const {
    return static_cast<size_t>((c / kernels_.panel * rows_ + r) * kernels_.panel + c % kernels_.panel);
  }

  void load(const float* s, double factor) {
    const int64_t panel = kernels_.panel;
    for (int64_t p = 0; p < panels_; ++p) {
      const int64_t first = p * panel, count = std::min(panel, d_ - first);
      for (int64_t r = 0; r < rows_; ++r) {
        float* row = p_->data() + (p * rows_ + r) * panel;
        const int64_t filled = r < d_ ? count : 0;
        for (int64_t c = 0; c < filled; ++c)
          row[c] = static_cast<float>((static_cast<double>(s[r * d_ + first + c]) + s[(first + c) * d_ + r]) * factor);
        std::fill(row + filled, row + panel, 0.0f);
      }
    }
  }

  void store(float factor, float* out) const {
    const int64_t panel = kernels_.panel;
    for (int64_t r = 0; r < d_; ++r)
      for (int64_t first = 0; first < d_; first += panel) {
        const float* row = x_->data() + (first / panel * rows_ + r) * panel;
        const int64_t count = std::min(panel, d_ - first);
        for (int64_t c = 0; c < count; ++c) out[r * d_ + first + c] = factor * row[c];
      }
  }

  const MatrixRootKernels& kernels_;
  int64_t d_, panels_, rows_;
  Matrix matrices_[4];
  Matrix *x_ = &matrices_[0], *p_ = &matrices_[1], *m_ = &matrices_[2], *spare_ = &matrices_[3];
};

at::Tensor matrix_root(const at::Tensor& s, int64_t iterations, bool inverse) {
  const at::Tensor x = s.to(at::kFloat).contiguous();
  const int64_t batch = x.size(0), d = x.size(1);
  at::Tensor out = at::empty({batch, d, d}, x.options());
  if (x.numel() == 0) return out;
  const MatrixRootKernels& kernels = root_kernels();
  const float* source = x.const_data_ptr<float>();
  float* target = out.data_ptr<float>();
  const auto run = [&](int64_t begin, int64_t end) {
    Root root(kernels, d);
    for (int64_t b = begin; b < end; ++b) root.find(source + b * d * d, iterations, inverse, target + b * d * d);
  };
  if (batch >= at::get_num_threads()) at::parallel_for(0, batch, std::max<int64_t>(1, (1 << 14) / (d * d * d)), run);
  else run(0, batch);
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("matrix_root", &matrix_root); }

}  // namespace
}  // namespace planmill
