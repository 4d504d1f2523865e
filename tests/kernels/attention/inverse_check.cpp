// softmax_free_inverse.cu on the host under -fsanitize=thread: Newton against elimination, where landmarks are well
// spread, and both against P U = W; their barriers against data races.
#include <cmath>
#include <cstdio>
#include <random>

#include "../common/cuda_emulation.h"
#include "cuda/attention/softmax_free_inverse.cu"

int main() {
  std::mt19937 source(7);
  std::normal_distribution<float> normal;
  int d = 3, dv = 5, splits = 2, heads = 2, iterations = 20, plain = 0, given = 0;
  for (int m : {1, 4, 9, 18}) {
    std::vector<float> landmarks(heads * m * d), w(heads * splits * m * dv), whole(heads * m * dv);
    for (float& x : landmarks) x = 2 * normal(source);
    for (float& x : w) x = normal(source);
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < m * dv; ++i) whole[h * m * dv + i] = w[2 * h * m * dv + i] + w[(2 * h + 1) * m * dv + i];
    for (int shared = -1; shared < 2; ++shared) {  // -1: Newton; elimination in global and in shared memory
      std::vector<float> parts = w, out(heads * m * dv, NAN), scratch(heads * m * m, NAN);
      float ridge = 0.01f;
      float *l = landmarks.data(), *s = scratch.data(), *p = parts.data(), *u = out.data();
      void* newton[] = {&l, &s, &p, &u, &m, &d, &dv, &splits, &iterations, &plain, &given, &ridge};
      void* solve[] = {&l, &s, &p, &u, &m, &d, &dv, &splits, &plain, &shared, &ridge};
      const size_t padded = (m + 3) / 4 * 4, floats = shared < 0 ? 4 * padded * padded + m : m * (shared ? m + 1 : 1);
      const int failed = shared < 0 ? emulated::launch(newton_inverse, heads, 64, 4 * floats, newton)
                                    : emulated::launch(solve_inverse, heads, 64, 4 * floats, solve);
      double worst = failed;
      for (int h = 0; h < heads; ++h)
        for (int i = 0; i < m; ++i)
          for (int c = 0; c < dv; ++c) {
            double sum = 0.01 * u[(h * m + i) * dv + c];
            for (int j = 0; j < m; ++j) {
              double square = 0;
              for (int k = 0; k < d; ++k) square += std::pow(double{l[(h * m + i) * d + k]} - l[(h * m + j) * d + k], 2);
              sum += std::exp(-square / 2) * u[(h * m + j) * dv + c];
            }
            const double error = std::fabs(sum - whole[(h * m + i) * dv + c]);
            worst = error <= worst ? worst : error;  // NaN stays
          }
      if (!(worst < 1e-3)) {
        std::printf("m = %d, kind %d: P U is off W by %g\n", m, shared, worst);
        return 1;
      }
    }
  }
  std::printf("12 inverses checked\n");
}
