// Checks the elementary functions of common/vec_math.h against double arithmetic, over the whole range of float32.
// Built by test_vec_math.py; the macro that asks for a vector type says which one is checked.
#if defined(PLANMILL_AVX2)
#pragma GCC target("avx2,fma")
#elif defined(PLANMILL_AVX512)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "common/vec_math.h"

using namespace planmill;

namespace {

#if defined(PLANMILL_SSE2)
using Vec = VecSse2;
#elif defined(PLANMILL_AVX2)
using Vec = VecAvx2;
#elif defined(PLANMILL_AVX512)
using Vec = VecAvx512;
#else
using Vec = VecGeneric<16>;
#endif

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSmallest = std::numeric_limits<float>::min();  // below it a float has fewer digits
int failures = 0;

template <typename Vec::F (*function)(typename Vec::F)>
void check(const char* name, double (*exact)(double), double relative, double absolute, const std::vector<float>& points) {
  double worst = 0.0;
  for (size_t i = 0; i + Vec::kWidth <= points.size(); i += Vec::kWidth) {
    float got[Vec::kWidth];
    Vec::store(got, function(Vec::load(points.data() + i)));
    for (int lane = 0; lane < Vec::kWidth; ++lane) {
      const double want = exact(points[i + lane]), error = std::fabs(got[lane] - want);
      if (std::isnan(want) || std::isinf(static_cast<float>(want))) {
        if (std::isnan(want) ? !std::isnan(got[lane]) : got[lane] != static_cast<float>(want))
          if (++failures < 20) std::printf("%s(%g) is %g, not %g\n", name, points[i + lane], got[lane], want);
        continue;
      }
      worst = std::fmax(worst, (error - absolute) / std::fmax(std::fabs(want), kSmallest));
      if (!(error <= relative * std::fmax(std::fabs(want), kSmallest) + absolute) && ++failures < 20)
        std::printf("%s(%.9g) is %.9g, not %.9g\n", name, points[i + lane], got[lane], want);
    }
  }
  std::printf("%s: worst error %.2e\n", name, worst);
}

double exact_exp(double x) { return std::exp(x); }
double exact_exp2(double x) { return std::exp2(x); }
double exact_silu(double x) { return x / (1 + std::exp(-x)); }
double exact_gelu(double x) { return x > 0 ? x * (1 - 0.5 * std::erfc(x / std::sqrt(2.0))) : x * 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double exact_gelu_tanh(double x) { return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double exact_relu(double x) { return x < 0 ? 0 : x; }

}  // namespace

int main() {
  std::vector<float> points{0.0f, -0.0f, 1.0f, -1.0f, static_cast<float>(kInfinity), static_cast<float>(-kInfinity), NAN, 88.72283f,
                            88.72284f, -87.33654f, -103.97208f, -103.9721f, -104.0f, 3e38f, -3e38f, 1e-45f};
  for (int64_t bits = 0; bits < int64_t{1} << 32; bits += 40009) {  // every exponent, both signs, NaN too
    const auto pattern = static_cast<uint32_t>(bits);
    float x;
    std::memcpy(&x, &pattern, 4);
    points.push_back(x);
  }
  for (int i = -60000; i <= 60000; ++i) points.push_back(static_cast<float>(i) * 1.7e-3f);
  // x / (1 + e^-x) is 0 where e^-x leaves float32, below -88.7: absolute. The error of e^y is that of y where y is rounded
  // on the way: -x^2/2 of gelu, the cubic of gelu_tanh.
  check<exp<Vec>>("exp", exact_exp, 1.2e-7, 0, points);
  std::vector<float> below;
  for (const float x : points)
    if (!(x > 0)) below.push_back(x);
  check<exp2_below_or_nan<Vec>>("exp2_below_or_nan", exact_exp2, 2e-7, 8.4e-39, below);  // zero where it is below that
  check<relu<Vec>>("relu", exact_relu, 0, 0, points);
  check<silu<Vec>>("silu", exact_silu, 4e-7, 3e-37, points);
  check<gelu<Vec>>("gelu", exact_gelu, 5e-6, 0, points);
  check<gelu_tanh<Vec>>("gelu_tanh", exact_gelu_tanh, 1.5e-5, 1e-37, points);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
