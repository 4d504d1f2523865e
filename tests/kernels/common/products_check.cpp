// Checks the products of common/products.h against double arithmetic, every size around a register tile, every stride.
// Built by test_vec_math.py; the macro that asks for a vector type says which one is checked.
#if defined(PLANMILL_AVX2)
#pragma GCC target("avx2,fma")
#elif defined(PLANMILL_AVX512)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "common/products.h"

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

int failures = 0;
std::mt19937 random_bits(0);

std::vector<float> draw(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random_bits);
  return values;
}

void check_product(int64_t m, int64_t k, int64_t n, bool transposed, bool add) {
  const int64_t ldb = n + 3, ldc = n + 1, lda = (transposed ? m : k) + 2;
  const auto a = draw(lda * (transposed ? k : m)), b = draw(ldb * k), before = draw(ldc * m);
  auto c = before;
  const Strided left{a.data(), transposed ? 1 : lda, transposed ? lda : 1};
  multiply<Vec>(left, b.data(), ldb, c.data(), ldc, m, k, n, add);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < ldc; ++j) {
      double want = j >= n || add ? before[i * ldc + j] : 0.0, scale = std::fabs(want);
      for (int64_t p = 0; p < k && j < n; ++p) {
        const double term = double{left.data[i * left.row + p * left.column]} * b[p * ldb + j];
        want += term, scale += std::fabs(term);
      }
      const double got = c[i * ldc + j], bound = j < n ? 6e-8 * static_cast<double>(k + 1) * scale : 0.0;
      if (!(std::fabs(got - want) <= bound) && ++failures < 20)
        std::printf("(%ld x %ld x %ld)[%ld][%ld] is %g, not %g\n", m, k, n, i, j, got, want);
    }
}

void check_transpose(int64_t rows, int64_t columns) {
  const int64_t padded = rows + 5;
  const auto x = draw(rows * (columns + 1));
  std::vector<float> y(static_cast<size_t>(columns * padded), NAN);
  transpose(x.data(), columns + 1, rows, columns, y.data(), padded, padded);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < padded; ++r)
      if (y[c * padded + r] != (r < rows ? x[r * (columns + 1) + c] : 0.0f) && ++failures < 20)
        std::printf("transpose[%ld][%ld] is %g\n", c, r, y[c * padded + r]);
}

}  // namespace

int main() {
  for (int64_t m = 0; m <= 27; ++m)
    for (int64_t k : {0, 1, 2, 17})
      for (int64_t vectors : {1, 2, 3, 5})
        for (int flags = 0; flags < 4; ++flags) check_product(m, k, vectors * Vec::kWidth, flags & 1, flags & 2);
  for (int64_t rows : {0, 1, 7, 33})
    for (int64_t columns : {1, 15, 16, 17, 40}) check_transpose(rows, columns);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
