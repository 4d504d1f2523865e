"""What NVRTC says about a CUDA C++ kernel, without a GPU: the same facts as `triton_checks`, from csrc/cuda/**/*.cu.

NVRTC is the PyPI package nvidia-cuda-nvrtc (58 MB), called through ctypes: no driver, no toolkit. A kernel includes no
standard header; what it needs comes from `--include-path`. PTX and cubin are compiled separately, since the first shows
64-bit divisions as instructions and the second shows registers, spills and what became of the tensor cores.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

from planmill.kernels.common.triton_checks import Facts, read_cubin

ARCH = "sm_90a"
CALL_OF_RUNTIME = 0  # NVRTC_SUCCESS


@functools.cache
def library() -> ctypes.CDLL:
    """The NVRTC library of the installed package.

    Raises:
        ModuleNotFoundError: nvidia-cuda-nvrtc is not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    found = [path for root in roots for path in sorted(Path(root).glob("**/libnvrtc.so.*"))]
    if not found:
        raise ModuleNotFoundError("nvidia-cuda-nvrtc is not installed (pip install 'planmill[gpu]')")
    for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(found[0]))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    """Result `what` (PTX, CUBIN or ProgramLog) of a program."""
    size = ctypes.c_size_t()
    getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw[: size.value]


def compile_source(source: str, name: str, arch: str = ARCH, include: tuple[Path, ...] = ()) -> tuple[bytes, str]:
    """Compile CUDA C++: the cubin and the PTX.

    Raises:
        ValueError: the source does not compile; the message is the compiler's log.
    """
    results = []
    for target, what in ((arch, "CUBIN"), (arch.replace("sm_", "compute_"), "PTX")):
        options = [f"--gpu-architecture={target}", "--std=c++17", *(f"--include-path={path}" for path in include)]
        program = ctypes.c_void_p()
        library().nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            if library().nvrtcCompileProgram(program, len(options), encoded) != CALL_OF_RUNTIME:
                raise ValueError(f"{name} does not compile for {target}:\n{_text(program, 'ProgramLog').decode()}")
            results.append(_text(program, what))
        finally:
            library().nvrtcDestroyProgram(ctypes.byref(program))
    return results[0], results[1].decode()


def check_source(source: str, name: str, include: tuple[Path, ...] = ()) -> Facts:
    """Facts of the kernels in a CUDA C++ source, compiled for sm_90a; the largest where it holds several."""
    cubin, ptx = compile_source(source, name, include=include)
    return read_cubin(name, 90, cubin, ptx, dynamic_shared=0)
