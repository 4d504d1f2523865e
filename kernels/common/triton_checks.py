"""What a compiler says about a Triton kernel, without a GPU: registers, spills, shared memory, instructions.

Each `_triton` module lists in STATIC its kernels with the choices that ship. Run as a module, this file compiles them
for sm_80 and sm_90 (products for sm_120 too) and prints one JSON line each, but not under TRITON_INTERPRET: those of
the families that are named (`routing`, `common`), or all.
ptxas, cuobjdump and nvdisasm come with the triton wheel.
"""

import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TARGETS = (80, 90)
PRODUCT_TARGETS = (80, 90, 120)  # sm_120 has the least shared memory, and only products use much of it
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a block may ask for, CUDA C++ guide, table 30
READ_AS_SASS = 90  # whose instructions are read; for the others, PTX and the assembler's report of registers and stack
TENSOR_CORE = {80: "mma", 90: "HGMMA", 120: "mma"}
SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
PTX_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][a-z0-9_]*)[.\s;]", re.MULTILINE)
DIVISION_PTX = re.compile(r"\b(?:div|rem)\.[su]64\b")
DIVISION_SASS = re.compile(r"__cuda_sm\d+_(?:div|rem)_[su]64|\b(?:I2F|F2I)\.[US]64|\bMUFU\.RCP64")


@dataclass(frozen=True)
class StaticKernel:
    """A kernel and the choices that ship, for the checks.

    Args:
        kernel: the jitted function.
        pointers: types of pointer arguments other than "*fp32"; arguments that end in `_ptr` are pointers.
        scalars: types of scalar arguments other than "i32".
        constants: values of the constexpr arguments, and of arguments that specialise to a constant (a unit stride).
        tensor_core: a product in half precision is in the kernel.
        aligned: scalars that divide by 16, as they specialise at the call; strides do in any case.
    """

    kernel: Any
    pointers: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    tensor_core: bool = False
    targets: tuple[int, ...] = TARGETS
    aligned: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The kernel and what distinguishes this entry."""
        shown = [f"{k}={v}" for k, v in {**self.constants, **self.pointers}.items() if not k.startswith("stride")]
        return f"{self.kernel.__name__}[{', '.join(shown)}]"


@dataclass(frozen=True)
class Facts:
    """What was read from one compiled kernel; `opcodes` counts instructions by their first word.

    They are SASS for sm_90 and PTX for the others: a disassembly takes as long as a compilation.
    """

    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int
    local_accesses: int
    divisions: int
    opcodes: dict[str, int]

    def problems(self, tensor_core: bool, shared_limit: int) -> list[str]:
        """Why this kernel must not ship; empty when nothing is wrong."""
        found = []
        if self.stack or self.local_accesses:
            found.append(f"spills or local arrays: {self.stack} bytes of stack, {self.local_accesses} LDL/STL")
        if self.shared > shared_limit:
            found.append(f"{self.shared} bytes of shared memory, {shared_limit} are allowed")
        if self.divisions:
            found.append(f"{self.divisions} 64-bit divisions")
        if tensor_core and not self.opcodes.get(TENSOR_CORE[self.arch]):
            found.append(f"no {TENSOR_CORE[self.arch]}: the product is not on the tensor cores of sm_{self.arch}")
        return [f"{self.kernel} on sm_{self.arch}: {problem}" for problem in found]


def tool(name: str) -> str:
    """Path of a binary utility in the triton wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _output(name: str, *arguments: str) -> str:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def read_cubin(kernel: str, arch: int, cubin: bytes, ptx: str, dynamic_shared: int) -> Facts:
    """Facts of a cubin that holds one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output("cuobjdump", "-res-usage", str(path))
        sass = _output("nvdisasm", "--print-code", "--no-dataflow", str(path)) if arch == READ_AS_SASS else ""
    used = {key: max(map(int, re.findall(rf"\b{key}:(\d+)", usage)), default=0) for key in ("REG", "STACK", "SHARED")}
    code, instruction = (sass, SASS_INSTRUCTION) if sass else (ptx, PTX_INSTRUCTION)
    opcodes = Counter(instruction.findall(code))
    return Facts(
        kernel,
        arch,
        registers=used["REG"],
        shared=max(used["SHARED"], dynamic_shared),
        stack=used["STACK"],
        local_accesses=opcodes["LDL"] + opcodes["STL"],
        divisions=len(DIVISION_PTX.findall(ptx)) + len(DIVISION_SASS.findall(sass)),
        opcodes=dict(opcodes),
    )


def compile_kernel(static: StaticKernel, arch: int) -> Any:
    """The kernel compiled for `arch`, as triton returns it; its `asm` holds every stage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, name in enumerate(inspect.signature(static.kernel.fn).parameters):
        if name in static.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = static.pointers.get(name, "*fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = static.scalars.get(name, "i32")
            if "stride" in name or name == "channels" or name in static.aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(static.kernel, signature, constexprs=static.constants, attrs=attributes)
    options = {"num_warps": static.num_warps, "num_stages": static.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(static: StaticKernel, arch: int) -> tuple[Facts, list[str]]:
    """Compile for one architecture and read the result: facts and problems."""
    compiled = compile_kernel(static, arch)
    facts = read_cubin(static.name, arch, compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)
    return facts, facts.problems(static.tensor_core, SHARED_LIMIT[arch])


def shipped(families: tuple[str, ...] = ()) -> Iterator[StaticKernel]:
    """The STATIC lists of every op's `_triton` module and of the modules that they share ("common"), or of some."""
    from planmill.kernels import ops

    modules = [f"{spec.package}._triton" for spec in ops().values() if (spec.cuda or "").startswith("_triton")]
    common = sorted(Path(__file__).parent.glob("triton_*.py"))
    modules += [f"planmill.kernels.common.{path.stem}" for path in common if path.stem != Path(__file__).stem]
    for module in modules:
        if families and module.split(".")[2] not in families:
            continue
        yield from importlib.import_module(module).STATIC


def main() -> int:
    """Check what ships; one JSON line per kernel and architecture; 1 where a problem was found."""
    jobs = [(static, arch) for static in shipped(tuple(sys.argv[1:])) for arch in static.targets]
    failed = False
    with ThreadPoolExecutor(2) as pool:  # the work is in subprocesses and in LLVM, which frees the interpreter lock
        for facts, problems in pool.map(lambda job: check(*job), jobs):
            print(json.dumps({**asdict(facts), "problems": problems}), flush=True)
            failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
