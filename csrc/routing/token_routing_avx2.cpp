// token_routing for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "routing/token_routing_kernels.h"

namespace planmill {

const RoutingKernels* routing_avx2() {
  static constexpr RoutingKernels kernels = routing_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
