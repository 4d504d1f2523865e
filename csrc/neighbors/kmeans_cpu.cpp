// kmeans on the CPU: see lloyd.h.
#include "common/torch_headers.h"

#include "neighbors/lloyd.h"

namespace planmill {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kmeans(const at::Tensor& features, const at::Tensor& centers,
                                                                  int64_t iterations, double least, bool relocate) {
  const at::Tensor x = features.contiguous();
  at::Tensor moved = centers.clone(at::MemoryFormat::Contiguous);
  const int64_t n = x.size(0), d = x.size(1);
  at::Tensor distances = at::empty({n}, at::kFloat), labels = at::empty({n}, at::kInt), rounds = at::empty({1}, at::kInt);
  const Rows rows(x, d);
  Lloyd lloyd(rows, moved);
  rounds.data_ptr<int32_t>()[0] = static_cast<int32_t>(lloyd.run(iterations, least, relocate));
  std::copy(lloyd.distances().begin(), lloyd.distances().end(), distances.data_ptr<float>());
  std::copy(lloyd.labels().begin(), lloyd.labels().end(), labels.data_ptr<int32_t>());
  return {moved, distances, labels, rounds};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("kmeans", &kmeans); }

}  // namespace
}  // namespace planmill
