"""The declaration machinery, capabilities, and what importing planmill does not do."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from planmill import kernels
from planmill.kernels.common import backends, cpu, discovery, registration
from planmill.kernels.common.inputs import poison_row, strided
from planmill.kernels.common.spec import REGISTRY, Case, OpSpec


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def doubled_reference(x: torch.Tensor, factor: float) -> torch.Tensor:
    return (x.double() * factor).float()


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> OpSpec:
    """An op of the test's own, entered and left again."""
    made = OpSpec(
        schema="doubled_for_test(Tensor x, float factor) -> Tensor",
        outputs=lambda x, factor: [(x.shape, torch.float32)],
        reference=doubled_reference,
        cases=lambda: [Case("one", lambda t, g: (torch.ones(3, dtype=t), 2.0))],
        no_kernel="a test",
    )
    monkeypatch.setattr(registration, "REGISTRY", {})
    if not hasattr(torch.ops.planmill, made.name):
        registration.register(made)
    return made


def test_a_declaration_becomes_an_op_with_gradient(spec: OpSpec) -> None:
    x = torch.ones(3, requires_grad=True)
    out = spec.op(x, 4.0)
    assert out.tolist() == [4.0, 4.0, 4.0]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [4.0, 4.0, 4.0]


def test_gradient_of_a_gradient_free_call_is_absent(spec: OpSpec) -> None:
    with torch.no_grad():
        assert not spec.op(torch.ones(3, requires_grad=True), 4.0).requires_grad
    with torch.inference_mode():
        assert spec.op(torch.ones(3), 4.0).tolist() == [4.0, 4.0, 4.0]


def test_an_op_is_declared_once() -> None:
    with pytest.raises(ValueError, match="knn: declared twice"):
        registration.register(REGISTRY["knn"])


def test_an_op_without_kernel_says_why() -> None:
    with pytest.raises(ValueError, match="says why"):
        OpSpec("x(Tensor a) -> Tensor", lambda a: [], doubled_reference, list)


def test_which_names_backend_and_reasons() -> None:
    choice = kernels.which("knn", "cpu")
    if cpu.extension() is None:
        assert choice.backend == "reference"
        assert "no compiler" in choice.missing[0]
        return
    assert choice.backend.startswith("C++ (")
    assert len(choice.missing) == len(cpu.LEVELS) - len(kernels.cpu_capabilities())
    assert kernels.which("neighbor_rescoring").backend == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_which_says_that_there_is_no_gpu() -> None:
    assert kernels.which("knn", "cuda").missing[0].startswith("no GPU")


def test_which_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.cpu, "extension", lambda: None)
    choice = kernels.which("knn", "cpu")
    assert choice.backend == "reference"
    assert "no compiler" in str(choice)


@pytest.mark.parametrize(
    ("op", "device", "message"), [("nope", "cpu", "no op named 'nope'"), ("knn", "meta", "cpu or cuda")]
)
def test_which_messages(op: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.which(op, device)


@pytest.mark.skipif(cpu.extension() is None, reason="the levels belong to the C++ extension, which was not built here")
def test_levels_are_held_and_given_back() -> None:
    before = kernels.which("knn").backend
    with kernels.cpu_capability("baseline"):
        choice = kernels.which("knn")
        assert choice.backend == "C++ (baseline)"
        assert any("held back" in reason for reason in choice.missing) or kernels.cpu_capabilities() == ("baseline",)
    assert kernels.which("knn").backend == before
    with pytest.raises(ValueError, match="not 'sse9'"), kernels.cpu_capability("sse9"):
        pass


def test_import_is_light() -> None:
    heavy = run(
        "import sys, torch; before = set(sys.modules); import planmill, planmill.kernels;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'triton', 'numba', 'matplotlib', 'timm', 'transformers', 'PIL', 'sklearn', 'tensorrt'}),"
        "torch.cuda.is_initialized())"
    )
    assert heavy.split() == ["[]", "False"]


@pytest.mark.parametrize("folder", ["kernels", "engine"])
def test_a_package_imported_under_its_folder_name_is_refused(folder: str) -> None:
    code = (
        f"import importlib.util as u, planmill.{folder} as p\n"
        f"s = u.spec_from_file_location('{folder}', p.__file__)\n"
        "try: s.loader.exec_module(u.module_from_spec(s))\n"
        "except ImportError as e: print(e)"
    )
    assert f"planmill.{folder}" in run(code)


def test_lazy_names() -> None:
    import planmill

    assert planmill.find_neighbors is kernels.neighbors.find_neighbors
    assert planmill.MutualScorer is kernels.neighbors.MutualScorer
    with pytest.raises(AttributeError, match="no attribute 'find_nothing'"):
        planmill.find_nothing  # noqa: B018


def test_public_names_say_what_they_are() -> None:
    """Functions of every family have the sections of a docstring, those in folders without an op too."""
    for family in kernels.families():
        module = getattr(kernels, family)
        for public in (getattr(module, name) for name in module.__all__):
            assert public.__doc__, f"{family}: a public name without a docstring"
            for part in ("Args:", "Returns:", "Raises:", "Source:") if inspect.isfunction(public) else ():
                assert part in public.__doc__, f"{family}.{public.__name__}: docstring lacks {part}"


def family_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **exports: str) -> dict[str, object]:
    """Names that `export_ops` finds in a family of folders without ops, each with one public function."""
    (folder / "made").mkdir()
    (folder / "made" / "__init__.py").write_text("")
    for name, public in exports.items():
        (folder / "made" / name).mkdir()
        (folder / "made" / name / "__init__.py").write_text(f"def {public}(): ...\n__all__ = ['{public}']\n")
    monkeypatch.syspath_prepend(folder)
    for name in ("made", *(f"made.{name}" for name in exports)):
        monkeypatch.delitem(sys.modules, name, raising=False)
    namespace: dict[str, object] = {"__path__": [str(folder / "made")]}
    namespace["__all__"] = discovery.export_ops("made", namespace)
    return namespace


def test_a_folder_without_an_op_exports_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = family_of(tmp_path, monkeypatch, gate="open_gate", fence="climb_fence")
    assert found["__all__"] == ["climb_fence", "open_gate"]
    assert callable(found["open_gate"])


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        ({"gate": "swing", "door": "swing"}, "made: two ops export 'swing'"),
        ({"gate": "gate"}, "a public name may not hide its own folder"),
    ],
)
def test_names_that_clash(
    exports: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImportError, match=message):
        family_of(tmp_path, monkeypatch, **exports)


def test_input_makers() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(strided(x), x)
    assert not strided(x).is_contiguous()
    assert int(poison_row(x, 1).isnan().sum()) == 1
