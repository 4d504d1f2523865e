// A loaded AOTInductor package for engine/targets/aoti.py. torch's own binding holds the interpreter's lock while the
// package runs (torch 2.13), and a server could not even answer a health check meanwhile; this one lets go of it.
// A session never runs two calls at once, so a package needs none of torch's events between calls; a CUDA graph could
// not hold them.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

namespace planmill {
namespace {

class AotiRunner {
 public:
  AotiRunner(const std::string& path, bool single_threaded) : loader_(path, "model", single_threaded, 1, -1) {}

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) {
    const py::gil_scoped_release released;
    return loader_.boxed_run(std::move(inputs));
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace

void bind_aoti_runner(py::module_& m) {
  py::class_<AotiRunner>(m, "AotiRunner")
      .def(py::init<std::string, bool>(), py::arg("path"), py::arg("single_threaded") = false)
      .def("__call__", &AotiRunner::run);
}

}  // namespace planmill
