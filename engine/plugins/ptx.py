"""A traced launch as PTX whose parameters stand in the order that TensorRT passes: inputs, sizes, outputs."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from planmill.engine.plugins.launches import Launch, NotOneKernel
from planmill.engine.plugins.sizes import Expression

# What a driver of CUDA 13.0 takes; Triton 3.9 writes a later one for sm_90 when it is left to choose.
PTX_VERSION = 87

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*u8",
}
_ENTRY = re.compile(r"(\.visible \.entry \w+\()(.*?)(\n\))", re.DOTALL)


@dataclass(frozen=True)
class Kernel:
    """A kernel as a plan holds it.

    Args:
        name: of the entry.
        ptx: the code.
        sizes: the integers between inputs and outputs, in their order: ints and Expressions.
        grid: sizes in x, y and z.
        threads: of a block.
        shared: bytes of dynamic shared memory.
    """

    name: str
    ptx: str
    sizes: tuple[Any, ...]
    grid: tuple[Any, Any, Any]
    threads: int
    shared: int


def compile_launch(launch: Launch, inputs: list[torch.dtype], outputs: list[torch.dtype], sm: int) -> Kernel:
    """Compile a launch; constants and floats are folded in, since a plan passes 32-bit integers only.

    Args:
        launch: from `trace_launch`.
        inputs: dtypes of the op's inputs.
        outputs: dtypes of its outputs.
        sm: the architecture, e.g. 90.

    Raises:
        NotOneKernel: the kernel asks for scratch memory, or does not write an output.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if isinstance(value, tuple):
            signature[name] = _POINTERS[(inputs if value[0] == "input" else outputs)[value[1]]]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or not _is_size(value) or (_is(value, 1) and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {**launch.options, "ptx_version": PTX_VERSION}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    scratch = compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size
    if scratch:
        raise NotOneKernel(f"{launch.kernel.__name__} asks for {scratch} bytes of scratch memory")
    passed = [value for name, value in launch.arguments.items() if name not in constants]
    ptx, sizes = order_parameters(compiled.asm["ptx"], passed, len(inputs), len(outputs))
    metadata = compiled.metadata
    return Kernel(metadata.name, ptx, sizes, launch.grid, metadata.num_warps * 32, metadata.shared)


def _is_size(value: Any) -> bool:
    return isinstance(value, int | Expression) and not isinstance(value, bool)


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number


def order_parameters(ptx: str, passed: list[Any], inputs: int, outputs: int) -> tuple[str, tuple[Any, ...]]:
    """Put the parameters of an entry into the order of a plan; code refers to them by name, so it stays as it is.

    Triton appends two pointers to scratch memory, which nothing passes here: they go. An input that the kernel does not
    take is passed all the same: it gets a parameter that nothing reads.

    Args:
        ptx: with one entry.
        passed: what the entry's parameters are, as in `Launch.arguments`, without the constants.
        inputs: of the op.
        outputs: of the op.

    Raises:
        NotOneKernel: the kernel writes no such output, or the entry has other parameters.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise NotOneKernel("the PTX has no entry")
    declared = [line.strip().rstrip(",") for line in entry[2].strip().splitlines()]
    if len(declared) != len(passed) + 2:
        raise NotOneKernel(f"the PTX takes {len(declared)} parameters, and {len(passed) + 2} were expected")
    for hidden in declared[len(passed) :]:
        if ptx.count(hidden.split()[-1]) > 1:
            raise NotOneKernel("the kernel reads scratch memory")
    tensors: dict[tuple[str, int], str] = {}
    scalars = []
    body = ptx[entry.end() :]
    for value, line in zip(passed, declared, strict=False):
        if not isinstance(value, tuple):
            scalars.append((value, line))
        elif (
            value in tensors
        ):  # passed twice, as a launcher does for an argument that is not there: one parameter serves
            body = re.sub(rf"\b{line.split()[-1]}\b", tensors[value].split()[-1], body)
        else:
            tensors[value] = line
    missing = [i for i in range(outputs) if ("output", i) not in tensors]
    if missing:
        raise NotOneKernel(f"the kernel does not write output {missing[0]}")
    lines = [tensors.get(("input", i), f".param .u64 unread_{i}") for i in range(inputs)]
    lines += [line for _, line in scalars]
    lines += [tensors[("output", i)] for i in range(outputs)]
    text = entry[1] + "\n\t" + ",\n\t".join(lines) + entry[3]
    return ptx[: entry.start()] + text + body, tuple(value for value, _ in scalars)
