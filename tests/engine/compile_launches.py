"""Runs in a process of its own, without Triton's interpreter: `python compile_launches.py FOLDER OP ...` has Inductor
write the package of a model that calls each op, for a GPU that is not there. All but linking and running is done:
the launches are substituted, the program is moved, C++ is written, every kernel is compiled to machine code for sm_90.

What torch asks of a GPU on the way is answered by stand-ins; what it would time there is taken as the only choice. The
launches are substituted before the program is moved, the other way around than in a build: a torch without CUDA cannot
make every tensor of a GPU without memory.
Prints one JSON line per op for test_substitution.py.
"""

import contextlib
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from follow_launches import captured_at_any_batch
from triton.backends.compiler import GPUTarget

from planmill import kernels
from planmill.engine import Captured, PlanError
from planmill.engine.substitution import exact_writes, substitute_launches
from planmill.engine.targets import Options, aoti
from planmill.kernels import OpSpec

FACTS = SimpleNamespace(
    name="a GPU", gcnArchName="", multi_processor_count=132, major=9, minor=0, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 << 30,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
)  # fmt: skip
PLACE = torch.device("cuda", 0)
UNLINKED = {"freezing": False, "aot_inductor.package_cpp_only": True, "aot_inductor.precompile_headers": False,
            "joint_graph_constant_folding": False}  # fmt: skip


class Driver:
    """Triton's driver: it knows the architecture and starts nothing."""

    launcher_cls = staticmethod(lambda source, metadata: None)
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        load_binary=lambda name, binary, shared, device: (0, 0, 32, 0, 1024),
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return PLACE

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def stand_in(toolkit: Path) -> None:
    """Put the stand-ins in their places."""
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as post
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime import triton_helpers
    from torch.utils import cpp_extension

    triton.runtime.driver.set_active(Driver())
    cuda: Any = torch.cuda
    interface: Any = CudaInterface
    for owner, names in ((interface, ()), (interface.Worker, ()), (cuda, ("device_of",))):
        for name in ("get_device_properties", "get_device_capability", "current_device", *names):
            answer = {"get_device_properties": FACTS, "get_device_capability": (9, 0), "current_device": 0}.get(
                name, contextlib.nullcontext()
            )
            setattr(owner, name, staticmethod(lambda *_, answer=answer: answer))
    for name in ("exchange_device", "maybe_exchange_device", "set_device"):
        setattr(interface, name, staticmethod(lambda device: 0))
        setattr(cuda, f"_{name}", lambda device: 0)
    interface.get_compute_capability = staticmethod(lambda device=None: 90)
    interface.is_available = staticmethod(lambda: True)
    # Patterns are traced on tensors of the device; none is needed for our kernels.
    for passes in (joint, post):
        passes.lazy_init = lambda *_: None  # type: ignore[attr-defined]
    triton_helpers.set_driver_to_gpu = lambda: None
    config.compile_threads = 1
    for part in ("include", "lib64"):
        (toolkit / part).mkdir(parents=True)
    cpp_extension.CUDA_HOME = str(toolkit)
    PythonWrapperCodegen.generate_and_run_autotune_block = compile_only  # type: ignore[method-assign]


def compile_only(wrapper: Any) -> None:
    """Inductor's own kernels and ours, compiled and kept, but not run to be timed."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    scope: dict[str, Any] = {}
    exec(wrapper.kernel_autotune_defs.getvalue() + "\nasync_compile.wait(globals())\n", scope)
    for kernel in scope.values():
        if isinstance(kernel, CachingAutotuner):
            kernel.precompile()
            kernel.save_gpu_kernel(0, kernel.launchers[0])


def without_memory(captured: Captured) -> Captured:
    """The program with inputs that have sizes only: a GPU's memory cannot be had."""
    program = captured.program
    mode = next(n.meta["val"].fake_mode for n in program.graph.nodes if n.op == "placeholder")
    assert not program.state_dict
    given = tuple(mode.from_tensor(x, static_shapes=True) for x in captured.examples)
    program._example_inputs = (given, {})
    return captured


def compile_op(spec: OpSpec, folder: Path) -> dict[str, Any]:
    """The package's members and what its C++ says."""
    args = next(case for case in spec.cases() if case.compiled).make(torch.float32, torch.Generator().manual_seed(0))
    args = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
    captured = without_memory(captured_at_any_batch(spec, args))
    mode = captured.program.example_inputs[0][0].fake_mode
    options = Options("aot", (), "cuda")
    with torch.no_grad():
        try:
            made, inside = substitute_launches(captured)
        except PlanError as error:
            return {"op": spec.name, "refused": str(error)}
        with mode:
            program = aoti._moved(made.program, PLACE)
        settings = aoti._settings(captured, options) | UNLINKED
        path = folder / f"{spec.name}.pt2"
        with exact_writes():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    with zipfile.ZipFile(path) as package:
        names = package.namelist()
        text = "".join(package.read(n).decode() for n in names if n.endswith("wrapper.cpp"))
    binaries = sum(name.endswith(".cubin") for name in names)
    called = f"planmill::{spec.name}" in text
    return {"op": spec.name, "refused": "", "kernels": inside, "binaries": binaries, "called": called}


if __name__ == "__main__":
    stand_in(Path(sys.argv[1]) / "toolkit")
    for name in sys.argv[2:]:
        print(json.dumps(compile_op(kernels.ops()[name], Path(sys.argv[1]))), flush=True)
