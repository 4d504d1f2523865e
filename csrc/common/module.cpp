// planmill.kernels._C: what Python asks of the extension besides the ops, which register themselves with torch.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/library.h>

#include <deque>
#include <string>

#include "common/cpu_capability.h"

namespace planmill {
void bind_aoti_runner(py::module_& m);  // engine/aoti_runner.cpp
}

namespace {

bool wants_gradient(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  if (!at::GradMode::is_enabled()) return false;
  const auto arguments = torch::jit::last(stack, op.schema().arguments().size());
  for (const c10::IValue& value : arguments)
    if (value.isTensor() && value.toTensor().requires_grad()) return true;
  return false;
}

// The Autograd kernel of every differentiable op. Without a gradient to compute it passes on below autograd, which costs
// well under a microsecond; otherwise it calls the Python function that records the op.
class AutogradGate final : public c10::OperatorKernel {
 public:
  explicit AutogradGate(py::function differentiate) : differentiate_(new py::function(std::move(differentiate))) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    if (!wants_gradient(op, *stack)) {
      at::AutoDispatchBelowADInplaceOrView below;
      op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
      return;
    }
    py::gil_scoped_acquire gil;
    const auto values = torch::jit::pop(*stack, op.schema().arguments().size());
    py::tuple arguments(values.size());
    for (size_t i = 0; i < values.size(); ++i) arguments[i] = torch::jit::toPyObject(values[i]);
    const py::object result = (*differentiate_)(*arguments);
    const auto& returns = op.schema().returns();
    if (returns.size() == 1) {
      stack->push_back(torch::jit::toIValue(result, returns[0].type()));
      return;
    }
    const auto outputs = result.cast<py::tuple>();
    for (size_t i = 0; i < returns.size(); ++i)
      stack->push_back(torch::jit::toIValue(outputs[i], returns[i].type()));
  }

 private:
  // Never freed: the dispatcher outlives the interpreter, and destroying a Python object after that would crash.
  py::function* differentiate_;
};

void register_autograd_gate(const std::string& name, py::function differentiate) {
  static auto* libraries = new std::deque<torch::Library>();  // kept for the life of the process, like the gates
  libraries->emplace_back(torch::Library::IMPL, "planmill", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  libraries->back().impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                           std::make_unique<AutogradGate>(std::move(differentiate))));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using planmill::CpuCapability;
  m.def("cpu_capability_limit", [] { return static_cast<int>(planmill::cpu_capability_limit()); });
  m.def("cpu_capability", [] { return static_cast<int>(planmill::cpu_capability()); });
  m.def("set_cpu_capability", [](int level) { planmill::set_cpu_capability(static_cast<CpuCapability>(level)); });
  m.def("cpu_capability_reason",
        [](int level) { return planmill::cpu_capability_reason(static_cast<CpuCapability>(level)); });
  m.def("register_autograd_gate", &register_autograd_gate);
  planmill::bind_aoti_runner(m);
}
