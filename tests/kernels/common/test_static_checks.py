"""Every GPU kernel that ships is compiled without a GPU and read: no spills, no 64-bit division, tensor cores used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planmill.kernels.common import nvrtc_checks
from planmill.kernels.common.triton_checks import PRODUCT_TARGETS, SHARED_LIMIT

ROOT = Path(__file__).parents[3]
FAMILIES = sorted({path.relative_to(ROOT / "kernels").parts[0] for path in ROOT.glob("kernels/**/*triton*.py")})
MULTIPLYING = ("common", "moments", "neighbors", "routing")  # on the tensor cores of sm_90
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("**/*.cu"))

# In a process of its own: under TRITON_INTERPRET kernels are no longer functions that can be compiled.
BAD_KERNELS = """
import sys
import triton, triton.language as tl
from planmill.kernels.common.triton_checks import StaticKernel, check

@triton.jit
def spilling(x_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    tl.store(x_ptr + o, x / tl.sum(x))

@triton.jit
def dividing(x_ptr, n, m):
    i = tl.program_id(0).to(tl.int64) * n.to(tl.int64) * n
    tl.store(x_ptr + i // m.to(tl.int64), 1.0)

@triton.jit
def too_wide(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o[:, None] * BLOCK + o[None, :])
    tl.store(y_ptr + o[:, None] * BLOCK + o[None, :], tl.dot(x, x))

for static in (StaticKernel(spilling, constants={"BLOCK": 16384}, num_warps=1), StaticKernel(dividing),
               StaticKernel(too_wide, {"x_ptr": "*fp16"}, constants={"BLOCK": 32}, num_warps=1, tensor_core=True)):
    facts, problems = check(static, 90)
    print(facts.kernel.partition("[")[0], "|", " ".join(problems))
"""

GOOD_CUDA = """
extern "C" __global__ void scale(float* x, float by, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= by;
}
"""
BAD_CUDA = """
extern "C" __global__ void bad(float* x, long long n, const int* where) {
    float local[64];
    for (int i = 0; i < 64; ++i) local[i] = x[i];
    for (int i = 0; i < 64; ++i) local[where[i] & 63] += local[i];
    x[(threadIdx.x * n) / (n + 3)] = local[where[0] & 63];
}
"""


LONG = ("attention", "routing")  # most of a minute each


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow if f in LONG else ()) for f in FAMILIES])
def test_every_kernel_that_ships(family: str) -> None:
    result = run("-m", "planmill.kernels.common.triton_checks", family)
    assert result.stdout, result.stderr
    facts = [json.loads(line) for line in result.stdout.splitlines()]
    problems = [problem for fact in facts for problem in fact["problems"]]
    assert not problems, "\n".join(problems)
    assert result.returncode == 0, result.stderr
    assert {80, 90} <= {fact["arch"] for fact in facts} <= set(PRODUCT_TARGETS)
    assert all(fact["registers"] > 0 and fact["opcodes"] for fact in facts), "nothing was read from a kernel"
    assert all(fact["shared"] <= SHARED_LIMIT[fact["arch"]] for fact in facts)
    if family in MULTIPLYING:
        assert [fact for fact in facts if fact["arch"] == 90 and fact["opcodes"].get("HGMMA")]


def test_every_triton_op_is_covered() -> None:
    code = (
        "from planmill.kernels.common.triton_checks import shipped\n"
        "print(' '.join(sorted({static.kernel.__name__ for static in shipped()})))"
    )
    result = run("-c", code)
    names = set(result.stdout.split())
    jitted = {
        line.split("(")[0].removeprefix("def ")
        for path in [*ROOT.glob("kernels/*/*/_triton*.py"), *ROOT.glob("kernels/common/triton_*.py")]
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel") and path.name != "triton_checks.py"
    }
    assert jitted == names, result.stderr


def test_the_checker_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "bad_kernels.py"
    path.write_text(BAD_KERNELS)
    result = run(str(path))
    found = dict(line.split(" | ", 1) for line in result.stdout.splitlines())
    assert set(found) == {"spilling", "dividing", "too_wide"}, result.stderr
    assert "spills" in found["spilling"]
    assert "64-bit divisions" in found["dividing"]
    assert "no HGMMA" in found["too_wide"]


def test_nvrtc_reads_a_good_and_a_bad_kernel() -> None:
    pytest.importorskip("nvidia", reason="nvidia-cuda-nvrtc is not installed")
    good = nvrtc_checks.check_source(GOOD_CUDA, "scale.cu")
    assert good.registers > 0
    assert good.problems(tensor_core=False, shared_limit=SHARED_LIMIT[90]) == []
    bad = nvrtc_checks.check_source(BAD_CUDA, "bad.cu").problems(tensor_core=True, shared_limit=SHARED_LIMIT[90])
    assert [word in " ".join(bad) for word in ("spills", "64-bit divisions", "no HGMMA")] == [True] * 3
    with pytest.raises(ValueError, match=r"wrong\.cu does not compile for sm_90a:\n.*error"):
        nvrtc_checks.check_source("__global__ void f() { undefined(); }", "wrong.cu")


def test_every_cuda_source() -> None:
    assert SOURCES
    for source in SOURCES:
        facts = nvrtc_checks.check_source(source.read_text(), source.name, (source.parent, ROOT / "csrc"))
        assert facts.problems(tensor_core=False, shared_limit=SHARED_LIMIT[90]) == []
        assert facts.registers <= 64, "a block of 1024 threads does not fit the register file"
