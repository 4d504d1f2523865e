// A loaded AOTInductor package for engine/targets/aoti.py. torch's own binding holds the interpreter's lock while the
// package runs (torch 2.13), and a server could not even answer a health check meanwhile; this one lets go of it.
// A session never runs two calls at once, so a package needs none of torch's events between calls; a CUDA graph could
// not hold them.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/buffer_pool.h"

namespace planmill {
namespace {

class AotiRunner {
 public:
  AotiRunner(const std::string& path, bool single_threaded) : loader_(path, "model", single_threaded, 1, -1) {}

  AotiRunner(const AotiRunner&) = delete;
  AotiRunner& operator=(const AotiRunner&) = delete;
  ~AotiRunner() { pool_->close(); }

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) {
    const py::gil_scoped_release released;
    const PoolGuard guard(*pool_);
    return loader_.boxed_run(std::move(inputs));
  }

  size_t kept_bytes() const { return pool_->free_bytes(); }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
  std::shared_ptr<BufferPool> pool_ = std::make_shared<BufferPool>();
};

}  // namespace

void bind_aoti_runner(py::module_& m) {
  py::class_<AotiRunner>(m, "AotiRunner")
      .def(py::init<std::string, bool>(), py::arg("path"), py::arg("single_threaded") = false)
      .def_property_readonly("kept_bytes", &AotiRunner::kept_bytes)
      .def("__call__", &AotiRunner::run);
}

}  // namespace planmill
