"""The package map and the C++ extension; everything else stands in pyproject.toml."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
PACKAGE_DIR = {"planmill": "planmill", "planmill.kernels": "kernels", "planmill.engine": "engine"}
CUDA = "planmill.csrc.cuda"
# With a precompiled header g++ no longer knows torch's lines from ours, and warns of its templates at each use.
NO_NOISE = ["-Wno-sign-compare"]
PRECOMPILED, HEADER = ROOT / "build" / "precompiled", "common/torch_headers.h"


def packages() -> list[str]:
    """All packages: `kernels/` and `engine/` stand beside `planmill/` in the tree and below it when installed."""
    found = []
    for name, folder in PACKAGE_DIR.items():
        found += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    # CUDA C++ is compiled where it runs: its folders are installed as they are (kernels/common/cuda.py).
    return [*found, *(f"{CUDA}.{sub}" for sub in find_namespace_packages("csrc/cuda"))]


def precompile(flags: list[str]) -> None:
    """Write the header's .gch where the flags or torch have changed; a compiler that cannot just takes longer later."""
    import torch

    header, out = ROOT / "csrc" / HEADER, PRECOMPILED / f"{HEADER}.gch"
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, *flags, "-x", "c++-header", str(header), "-o", str(out)]
    version = subprocess.run([*compiler, "--version"], check=False, capture_output=True, text=True).stdout
    made_from, stamp = f"{version} {torch.__version__} {command} {header.read_text()}", out.with_suffix(".from")
    if out.exists() and stamp.exists() and stamp.read_text() == made_from:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0:
        stamp.write_text(made_from)
    else:
        out.unlink(missing_ok=True)


def extensions() -> tuple[list, dict]:
    """The C++ extension, or nothing where no compiler is found: the package then runs on its references."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        print(f"planmill: no C++ compiler ({compiler}); installing without the C++ kernels")
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Compiles torch's headers once: they are most of the time of every file that includes them."""

        def build_extension(self, ext):
            flags = [*self.compiler.compiler_so[1:], *(f"-I{folder}" for folder in ext.include_dirs)]
            flags += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in ext.define_macros]
            precompile([*flags, *ext.extra_compile_args])
            super().build_extension(ext)

    sources = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp") if "tests" not in path.parts
    )
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    # PLANMILL_EMULATE: a build for tests, in which AVX-512 and AMX code runs over plain C++ on any machine.
    define_macros = [("PLANMILL_EMULATE", None)] if "PLANMILL_EMULATE" in os.environ else []
    extension = CppExtension(
        "planmill.kernels._C",
        sources,
        depends=headers,
        include_dirs=[str(PRECOMPILED), str(ROOT / "csrc")],  # g++ looks for a .gch in each folder in turn
        define_macros=define_macros,
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-fopenmp",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wall",
            "-g0",
            *NO_NOISE,
        ],
        extra_link_args=["-fopenmp"],
    )
    return [extension], {"build_ext": BuildKernels.with_options(use_ninja=True)}


class EditableWheel(editable_wheel):
    """Also links a view of the installed tree for mypy and pyright, which do not follow `package_dir`."""

    def run(self) -> None:
        view = ROOT / "build" / "typing" / "planmill"
        shutil.rmtree(view, ignore_errors=True)
        view.mkdir(parents=True)
        links = {entry.name: entry for entry in (ROOT / "planmill").iterdir() if entry.name != "__pycache__"}
        links |= {"kernels": ROOT / "kernels", "engine": ROOT / "engine"}
        for name, target in links.items():
            (view / name).symlink_to(os.path.relpath(target, view))
        super().run()


ext_modules, build_commands = extensions()
setup(
    packages=packages(),
    package_dir={**PACKAGE_DIR, CUDA: "csrc/cuda"},
    package_data={"": ["configs/*.json", "*.cu", "*.html", "*.css", "py.typed"]},
    ext_modules=ext_modules,
    cmdclass={**build_commands, "editable_wheel": EditableWheel},
)
