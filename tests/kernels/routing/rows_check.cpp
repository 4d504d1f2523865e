// Sums of rows of one instruction set against double arithmetic, for every element type and around every block of columns.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "routing/rows_kernels.h"

using namespace planmill;

namespace {

std::mt19937 generator(1);
std::normal_distribution<float> normal;

template <class T>
int failures(Element type, double unit) {
  using Stored = typename T::Stored;
  const RowKernels& kernels = *KERNELS();
  int failed = 0;
  for (const int d : {1, 7, 15, 16, 17, 33, 63, 64, 65, 200})
    for (const int count : {0, 1, 2, 5}) {
      std::vector<std::vector<Stored>> rows(count, std::vector<Stored>(d));
      std::vector<const void*> at;
      std::vector<float> weights(count), scale(d);
      std::vector<Stored> base(d), out(d);
      for (auto& row : rows) {
        for (auto& x : row) x = T::round(normal(generator));
        at.push_back(row.data());
      }
      for (auto& x : weights) x = normal(generator);
      for (auto& x : scale) x = normal(generator);
      for (auto& x : base) x = T::round(normal(generator));
      const auto compare = [&](int i, double want, double size) {
        failed += !(std::fabs(T::read(out[i]) - want) <= unit * std::fabs(want) + 1e-6 * size);
      };
      for (const bool weighted : {false, true}) {
        kernels.sum(type, at.data(), weighted ? weights.data() : nullptr, count, d, 0.5f, out.data());
        for (int i = 0; i < d; ++i) {
          double sum = 0.0, size = 0.0;
          for (int r = 0; r < count; ++r) {
            const double term = (weighted ? weights[r] : 1.0) * T::read(rows[r][i]);
            sum += term, size += std::fabs(term);
          }
          compare(i, 0.5 * sum, size);
        }
      }
      for (const int mode : {0, 1, 2, 3}) {
        if (count == 0) continue;
        kernels.add(type, mode & 1 ? base.data() : nullptr, mode & 2 ? scale.data() : nullptr, at[0], d, out.data());
        for (int i = 0; i < d; ++i) {
          const double term = (mode & 2 ? scale[i] : 1.0) * T::read(rows[0][i]), added = mode & 1 ? T::read(base[i]) : 0.0;
          compare(i, added + term, std::fabs(added) + std::fabs(term));
        }
      }
    }
  for (const float edge : {INFINITY, -INFINITY, NAN, 0.0f, -0.0f})  // survive being stored
    for (const Stored x : {T::round(edge)})
      failed += std::isnan(edge) ? !std::isnan(T::read(x)) : T::read(x) != edge;
  return failed;
}

}  // namespace

int main() {
  const int failed = failures<Float32>(Element::kFloat, 1e-6) + failures<BFloat16>(Element::kBFloat16, 1.0 / 256) +
                     failures<Half>(Element::kHalf, 1.0 / 2048);
  std::printf("%d failures\n", failed);
  return failed != 0;
}
