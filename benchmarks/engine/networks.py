"""Whole networks on the CPU: a plan beside eager PyTorch, torch.compile, ONNX Runtime and OpenVINO.

EfficientAD S and M and DRAEM at 256 x 256, SimpleNet's head (examples/zoo), the digits model, timm's ViT-S/16; random
weights, random statistics. The error is the largest difference from the float32 model, over the largest value of the
output. bf16 runs only where the processor has units for it: elsewhere every library emulates it.
"""

import copy
import functools
import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from planmill.engine import Session, build, capture
from planmill.engine.capture import Boundary
from planmill.inspection.results import default_plan_folder

from ..cases import Case, Draw, Goal, Peer

ROOT = Path(__file__).parents[2]
Inputs = tuple[torch.Tensor, ...]


@functools.cache
def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarked_{Path(name).stem}", ROOT / "examples" / name)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where torch.compile looks for its classes
    spec.loader.exec_module(module)
    return module


def _efficient_ad(size: str) -> torch.nn.Module:
    model = getattr(_example("zoo/efficient_ad.py"), size)()
    model.mean_std.mean.normal_()
    model.mean_std.std.uniform_(0.5, 2)
    for name, value in {"qa_st": 0.7, "qb_st": 1.1, "qa_ae": 0.5, "qb_ae": 0.8}.items():
        model.quantiles.get_buffer(name).fill_(value)
    return model


def _vit() -> torch.nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224", pretrained=False).eval()


# The model, and the shape of one sample of each input.
NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[tuple[int, ...], ...]]] = {
    "efficient_ad_s": (lambda: _efficient_ad("small"), ((3, 256, 256),)),
    "efficient_ad_m": (lambda: _efficient_ad("medium"), ((3, 256, 256),)),
    "simple_net": (lambda: _example("zoo/simple_net.py").wide_resnet50(), ((512, 36, 36), (1024, 18, 18))),
    "draem": (lambda: _example("zoo/draem.py").draem(), ((3, 256, 256),)),
    "digits": (lambda: _example("digits/model.py").load_model(), ((1, 32, 32),)),
    "vit_small": (_vit, ((3, 224, 224),)),
}
# Of the definition, per image.
FLOPS = {"efficient_ad_s": 75.9e9, "efficient_ad_m": 235e9, "simple_net": 10.2e9, "draem": 396e9}


@functools.cache
def _model(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name][0]().eval()


def _plan(name: str, inputs: Inputs, precision: Any, rewrite: bool) -> Path:
    """The plan of a network at these sizes; kept until the engine or the model changes."""
    digest = hashlib.sha256(repr((name, [x.shape for x in inputs], precision, rewrite, torch.__version__)).encode())
    for path in sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]):
        digest.update(path.read_bytes())
    folder = default_plan_folder() / "benchmarks"  # nobody else's: loading a plan runs its code
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest.hexdigest()[:24]}.plan"
    if not path.exists():
        build(_model(name), inputs, path, precision=precision, dynamic=None, rewrite=rewrite)
    return path


def _make(name: str, batch: int, rewrite: bool) -> Callable[[Draw], tuple]:
    def make(draw: Draw) -> tuple:
        precision = "bf16" if draw.dtype == torch.bfloat16 else "fp32"
        inputs = tuple(torch.rand(batch, *shape, generator=draw.generator) for shape in NETWORKS[name][1])
        return name, inputs, Session(_plan(name, inputs, precision, rewrite)), draw.dtype

    return make


def _ours(name: str, inputs: Inputs, session: Session, dtype: torch.dtype) -> Any:
    return session(*inputs)


def _tensors(result: Any) -> list[torch.Tensor]:
    values = [result] if isinstance(result, torch.Tensor) else list(result)
    return [torch.as_tensor(value) for value in values]


@torch.no_grad()
def _check(args: tuple, result: Any) -> float:
    wanted = _tensors(_model(args[0])(*args[1]))
    pairs = zip(_tensors(result), wanted, strict=True)
    return max(float((got.reshape(w.shape) - w).abs().max() / w.abs().max()) for got, w in pairs)


def _module(name: str, inputs: Inputs, dtype: torch.dtype) -> torch.nn.Module:
    """The network with a float32 boundary, computing in `dtype`."""
    if dtype == torch.float32:
        return _model(name)
    module = Boundary(copy.deepcopy(_model(name)).to(dtype), None, dtype).eval()
    with torch.no_grad():
        module.dtypes = [torch.float32] * len(_tensors(_model(name)(*inputs)))
    return module


def _eager(name: str, inputs: Inputs, session: Session, dtype: torch.dtype) -> Callable[[], Any]:
    return functools.partial(torch.no_grad()(_module(name, inputs, dtype)), *inputs)


def _compiled(name: str, inputs: Inputs, session: Session, dtype: torch.dtype) -> Callable[[], Any]:
    compiled = torch.compile(_module(name, inputs, dtype), dynamic=False)
    return functools.partial(torch.no_grad()(compiled), *inputs)


def _without(name: str, inputs: Inputs, session: Session, dtype: torch.dtype) -> Callable[[], Any]:
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return functools.partial(Session(_plan(name, inputs, precision, False)), *inputs)


def _onnxruntime(name: str, inputs: Inputs, session: Session, dtype: torch.dtype) -> Callable[[], Any]:
    import onnxruntime

    program = torch.onnx.export(_model(name), inputs, dynamo=True, verbose=False)
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        program.save(f"{folder}/model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        run = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {spec.name: x.numpy() for spec, x in zip(run.get_inputs(), inputs, strict=True)}
    return lambda: run.run(None, feed)


def _openvino(hint: str) -> Callable[..., Callable[[], Any]]:
    def prepare(name: str, inputs: Inputs, session: Session, dtype: torch.dtype) -> Callable[[], Any]:
        import openvino

        model = openvino.convert_model(capture(_model(name), inputs, dynamic=None).program)
        model.reshape({port: list(x.shape) for port, x in zip(model.inputs, inputs, strict=True)})
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        config["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
        compiled = openvino.Core().compile_model(model, "CPU", config)
        request = compiled.create_infer_request()
        arrays = [openvino.Tensor(x.numpy(), shared_memory=True) for x in inputs]

        def call() -> list:
            found = request.infer(arrays, share_outputs=False)
            return [found[port] for port in compiled.outputs]

        return call

    return prepare


def _peers(dtype: torch.dtype) -> dict[str, Peer]:
    half = dtype == torch.bfloat16
    return {
        "eager": Peer(_eager, devices=("cpu",)),
        "torch.compile": Peer(_compiled, devices=("cpu",)),
        "no rewrites": Peer(_without, devices=("cpu",)),
        **({} if half else {"onnxruntime": Peer(_onnxruntime, package="onnxruntime", devices=("cpu",))}),
        "openvino": Peer(_openvino("bf16" if half else "f32"), package="openvino", devices=("cpu",)),
    }


def _goals(name: str, batch: int, dtype: torch.dtype) -> tuple[Goal, ...]:
    goals = [Goal("ratio", 1.0, peer="torch.compile")]
    if (name, batch) == ("efficient_ad_s", 1):
        goals += [Goal("ratio", 1.2, peer=peer) for peer in ("openvino", "no rewrites")]
    if name in ("digits", "vit_small") and dtype == torch.float32:
        goals += [Goal("ratio", 1.0, peer=peer) for peer in ("onnxruntime", "openvino")]
    return tuple(goals)


def _has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


CASES = [
    Case(
        op="networks",
        id=f"{name}-{batch}" + ("" if dtype == torch.float32 else "-bf16"),
        make=_make(name, batch, True),
        ours=_ours,
        peers=_peers(dtype),
        check=_check,
        tolerance={torch.float32: 1e-4, torch.bfloat16: 0.1},
        flops=functools.partial(lambda per_image, *args: per_image * len(args[1][0]), FLOPS.get(name, 0.0)),
        small=_make(name, 1, True),
        dtypes=(dtype,),
        devices=("cpu",),
        goals=_goals(name, batch, dtype),
        calls={1: 20, 16: 4}[batch] if name == "digits" else 1,  # a core wakes up more slowly than a call ends
        memory=True,
    )
    for dtype in (torch.float32, *((torch.bfloat16,) if _has_bf16() else ()))
    for name in NETWORKS
    for batch in ((1,) if name == "draem" else (1, 16))
]
