// token_routing for baseline.
#define PLANMILL_SSE2
#include "routing/token_routing_kernels.h"

namespace planmill {

const RoutingKernels* routing_baseline() {
  static constexpr RoutingKernels kernels = routing_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
