"""Models as ONNX files under ONNX Runtime: with our ops by reference, without them, in half precision, damaged."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from rich.console import Console
from torch import nn
from torch._higher_order_ops.scan import scan

from planmill.cli.info import describe
from planmill.engine import Captured, DynamicDim, Plan, PlanError, build, capture, onnx_runner, targets
from planmill.engine.manifest import TensorSpec
from planmill.engine.onnx_export import OnnxModel, export_onnx
from planmill.engine.onnx_runner import OnnxRunner
from planmill.engine.targets import Built, Options, Plugins, find_target
from planmill.engine.verify import TOLERANCES, draw_inputs, verify
from planmill.kernels.attention import GatedLinearAttention, attend_linearly
from planmill.kernels.moments import CovariancePooling
from planmill.kernels.neighbors import MutualScorer
from planmill.kernels.routing import SparseMoE

SIZES = DynamicDim("batch", 1, 2, 5)


class Families(nn.Module):
    """A layer of every family; float32 [B, 10, 16] -> float32 [B, 5] and scores [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = GatedLinearAttention(16, 2)
        self.moe = SparseMoE(16, 24, 4, 2)
        self.norm = nn.LayerNorm(16)
        self.pool = CovariancePooling(16, None)
        self.head = nn.Linear(136, 5)
        self.scorer = MutualScorer(0.0, 0.5).extend(torch.randn(6, 10, 16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attention(x)
        x = x + self.moe(self.norm(x))
        scores = self.scorer.score(self.norm(x))
        return self.head(self.pool(x.mT.unflatten(2, (2, -1))).to(x.dtype)), scores


@pytest.fixture(scope="module")
def families() -> nn.Module:
    torch.manual_seed(0)
    return Families().eval()


@pytest.fixture(scope="module")
def plain(families: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Captured, OnnxModel]:
    captured = capture(families, torch.randn(3, 10, 16), dynamic=SIZES, output_names=["logits", "scores"])
    return captured, export_onnx(captured, tmp_path_factory.mktemp("plain"), plugins="none")


def test_every_family_without_plugins_agrees_with_the_model(plain: tuple[Captured, OnnxModel]) -> None:
    captured, model = plain
    runner = OnnxRunner(model.path, captured.outputs)
    receipt = verify(runner, captured, TOLERANCES["fp32"])
    assert {output.name for output in receipt.outputs} == {"logits", "scores"}
    assert max(output.max_rel for output in receipt.outputs) < 1e-4  # asked for: 1e-3
    assert "planmill" not in runner.proof
    proto = onnx.load(model.path)
    assert [(v.name, v.type.tensor_type.shape.dim[0].dim_param) for v in proto.graph.output] == [
        ("logits", "batch"),
        ("scores", "batch"),
    ]


def test_our_ops_by_reference_in_bfloat16(families: nn.Module, tmp_path: Path) -> None:
    captured = capture(families, torch.randn(3, 10, 16), dynamic=SIZES, precision="bf16")
    model = export_onnx(captured, tmp_path, plugins="python")
    assert {"planmill::bank_score", "planmill::expert_mixture", "planmill::matrix_root"} <= set(model.ops)
    runner = OnnxRunner(model.path, captured.outputs)
    receipt = verify(runner, captured, TOLERANCES["bf16"])
    # It is the precision of the plan that is compared, not float32 under another name.
    assert all(output.max_rel > 1e-4 for output in receipt.outputs)
    assert "planmill::bank_score" in runner.proof
    assert "by reference" in runner.proof
    assert "bfloat16 computed in float32 and rounded after every operator" in runner.proof


class Mixed(nn.Module):
    """float16 with a float32 norm, integers and booleans: four inputs, four outputs, two dynamic dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(400, 8).half()
        self.norm = nn.LayerNorm(8)
        self.layer = nn.Linear(8, 8).half()

    def forward(self, tokens: torch.Tensor, keep: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> dict:
        h = self.norm(self.table(tokens).float()).half()
        h = self.layer(h) * keep[..., None] + bias[:, None, None]
        y = attend_linearly(*[x[:, None]] * 3, causal=True)
        far = nn.functional.logsigmoid(100 * x)  # finite far below, where log(sigmoid(x)) is -inf
        return {"mean": h.mean(1), "count": keep.sum(1), "attended": y, "far": far}


def test_mixed_dtypes_two_dimensions_and_sequences_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch, length = SIZES, DynamicDim("length", 1, 64, 130)  # chunks of 64 tokens, one past two
    examples = {
        "tokens": torch.tensor([[0, 399, 3], [1, 2, 3]]),
        "keep": torch.tensor([[True, False, True], [True, True, True]]),
        "bias": torch.tensor([0.5, 2.0]).half(),
        "x": torch.randn(2, 3, 4),
    }
    dynamic = {name: {0: batch, 1: length} for name in ("tokens", "keep", "x")} | {"bias": {0: batch}}
    captured = capture(Mixed().eval(), examples, dynamic=dynamic)
    model = export_onnx(captured, tmp_path, plugins="none", largest=16)
    assert {node.op_type for node in onnx.load(model.path).graph.node} >= {"Scan"}
    assert (
        tmp_path / "model.onnx.data"
    ).stat().st_size >= 6400  # weights above `largest` bytes have a file of their own
    runner = OnnxRunner(model.path, captured.outputs)
    receipt = verify(runner, captured, TOLERANCES["fp16"])
    assert [case["length"] for case in receipt.cases] == [1, 33, 64, 130]
    assert "float16 computed in float32" in runner.proof
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(PlanError, match="no valid ONNX file"):
        OnnxRunner(model.path, captured.outputs)


class Inside(nn.Module):
    """An op of ours in a branch and in the body of a loop; float32 [B, T, 8] -> float32 [B, 2] and [T, B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(7, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows

        def near(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return torch.ops.planmill.knn(x, rows, 2, "l2", False, True)[0].to(x.dtype)

        def far(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return 2 * x[:, :2]

        def step(state: torch.Tensor, now: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            after = 0.5 * state + near(now, rows)
            return after.clone(), after.clone()

        first = x[:, 0]
        chosen = torch.cond(first[0, 0] > 0, near, far, (first, rows))
        return chosen, scan(step, torch.zeros_like(first[:, :2]), x.transpose(0, 1), dim=0)[1]


@pytest.fixture(scope="module")
def inside() -> nn.Module:
    torch.manual_seed(0)
    return Inside().eval()


@pytest.mark.slow
@pytest.mark.parametrize("plugins", ["python", "none"])
def test_our_ops_inside_branches_and_loops(inside: nn.Module, tmp_path: Path, plugins: Plugins) -> None:
    captured = capture(inside, torch.randn(3, 4, 8), dynamic=None, precision="fp16")
    model = export_onnx(captured, tmp_path, plugins=plugins)
    assert {"If", "Scan"} <= {node.op_type for node in onnx.load(model.path).graph.node}
    runner = OnnxRunner(model.path, captured.outputs)
    assert ("planmill::knn by reference" in runner.proof) == (plugins == "python")
    x = torch.randn(3, 4, 8)
    for sign in (1, -1):  # both branches
        x[0, 0, 0] = sign
        for got, want in zip(runner([x]), inside(x), strict=True):
            torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


def test_our_op_inside_a_branch_in_half_precision(tmp_path: Path) -> None:
    """float16 x [3, 8] -> distances to two of 7 rows where the sum of x is positive, else two columns of x."""
    make, half = onnx.helper.make_node, onnx.TensorProto.FLOAT16
    torch.manual_seed(0)
    rows = torch.randn(7, 8).half()

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        result = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3, 2])
        return onnx.helper.make_graph(list(nodes), name, [], [result])

    settings: dict[str, Any] = {"k": 2, "metric": "l2", "exclude_self": 0, "exact": 1}
    near = branch("near", make("knn", ["x", "rows"], ["near", "index"], domain="planmill", **settings))
    wide = make("Cast", ["halves"], ["far"], to=onnx.TensorProto.FLOAT)
    far = branch("far", make("Slice", ["x", "begin", "end", "axis"], ["halves"]), wide)
    nodes = [
        make("ReduceSum", ["x"], ["sum"], keepdims=0),
        make("Greater", ["sum", "zero"], ["positive"]),
        make("If", ["positive"], ["y"], then_branch=near, else_branch=far),
    ]
    constants = {"rows": rows, "zero": torch.zeros(()).half()} | {
        name: torch.tensor([value]) for name, value in (("begin", 0), ("end", 2), ("axis", 1))
    }
    graph = onnx.helper.make_graph(
        nodes,
        "branched",
        [onnx.helper.make_tensor_value_info("x", half, [3, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 2])],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("planmill", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), str(tmp_path / "a.onnx"))
    runner = OnnxRunner(tmp_path / "a.onnx", [TensorSpec(name="y", dtype="float32", shape=[3, 2])])
    x = torch.rand(3, 8).half()
    torch.testing.assert_close(runner([x])[0], torch.cdist(x.float(), rows.float()).sort(1).values[:, :2])
    torch.testing.assert_close(runner([-x])[0], -x[:, :2].float())


def test_our_op_inside_a_while_loop_is_one_error() -> None:
    body = onnx.helper.make_graph([onnx.helper.make_node("knn", ["a"], ["b"], domain="planmill")], "body", [], [])
    with pytest.raises(PlanError, match="op planmill::knn stands inside a Loop: build with --plugins none"):
        onnx_runner._is_cut(onnx.helper.make_node("Loop", ["n", "c"], ["b"], body=body))


def test_a_damaged_file_is_one_error(plain: tuple[Captured, OnnxModel], tmp_path: Path) -> None:
    captured, model = plain
    whole, path = model.path.read_bytes(), tmp_path / "damaged.onnx"
    generator = torch.Generator().manual_seed(0)
    inputs = draw_inputs(captured, {"batch": 2}, generator)
    refused = 0
    for index in range(40):
        at = int(torch.randint(0, len(whole), (), generator=generator))
        width = int(torch.randint(1, 64, (), generator=generator))
        noise = bytes(torch.randint(0, 256, (width,), generator=generator).tolist())
        path.write_bytes(whole[:at] if index % 4 == 0 else whole[:at] + noise + whole[at + width :])
        try:
            OnnxRunner(path, captured.outputs)(inputs)
        except PlanError:
            refused += 1
    assert refused >= 10  # the rest hit weights or names: a comparison with the model is what finds these
    with pytest.raises(PlanError, match="no valid ONNX file"):
        OnnxRunner(tmp_path / "absent.onnx", captured.outputs)


class Fake:
    """A target whose payload cannot run here: what is verified is the ONNX graph."""

    def compile_program(self, captured: Captured, folder: Path, options: Options) -> Built:
        model = export_onnx(captured, folder, plugins=options.plugins)
        (folder / "payload.bin").write_bytes(b"payload")
        return Built(
            folder / "payload.bin",
            onnx=model.path,
            layers={"MATRIX_MULTIPLY": 2, "PLUGIN_V3": 1},
            plugins={name.partition("::")[2]: "1" for name in model.ops},
            tensorrt_version="1.7.1.116",
            sms=options.sms,
            opset=model.opset,
            builder_seconds=1.25,
        )


class Scored(nn.Module):
    """float32 [B, 6] -> distances of its rows to four others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rows = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.planmill.knn(self.layer(x), self.rows, 2, "l2", False, True)[0]


def test_the_manifest_says_what_was_built_and_what_was_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planmill.engine.pipeline.find_target", lambda name: Fake())
    torch.manual_seed(0)
    x, path = torch.randn(3, 6), tmp_path / "a.plan"
    plan = build(Scored().eval(), x, path, target="tensorrt-rtx", plugins="python", sms=(80, 120), dynamic=SIZES)
    read = Plan.read(path).manifest
    assert read == plan.manifest
    assert read.receipt.verified == "onnx, not executed on device"
    assert "planmill::knn by reference" in read.receipt.proof
    assert read.ops == ["planmill::knn"]
    assert read.tensorrt is not None
    assert read.tensorrt.model_dump() == {
        "version": "1.7.1.116",
        "sms": [80, 120],
        "plugin_mode": "python",
        "plugins": {"knn": "1"},
        "layers": {"MATRIX_MULTIPLY": 2, "PLUGIN_V3": 1},
        "opset": 20,
        "profile": {"x": ([1, 6], [2, 6], [5, 6])},
        "builder_seconds": 1.25,
    }
    console = Console(record=True, width=200)
    describe(plan, console)
    text = console.export_text()
    for part in (
        "SM 8.0, SM 12.0",
        "python: knn (version 1)",
        "2 MATRIX_MULTIPLY, 1 PLUGIN_V3",
        "1x6 to 5x6",
        "opset 20",
    ):
        assert part in text
    assert "onnx, not executed on device" in text


def test_a_plan_of_another_tensorrt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planmill.engine.pipeline.find_target", lambda name: Fake())
    plan = build(Scored().eval(), torch.randn(3, 6), tmp_path / "a.plan", target="tensorrt-rtx", plugins="none")
    for here, message in (
        ("1.6.0.0", "built with tensorrt-rtx 1.7.1.116.*this is 1.6.0.0"),
        (None, "is not installed: pip"),
    ):
        found = {"tensorrt-rtx": here, "tensorrt": "1.7.1.116"}  # the other library does not count
        monkeypatch.setattr("planmill.engine.plan.package_version", found.get)
        with pytest.raises(PlanError, match=message):
            plan.check_environment()


def test_a_target_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr(targets.importlib, "import_module", missing)
    with pytest.raises(PlanError, match=r"target tensorrt-rtx needs onnx: pip install 'planmill\[tensorrt\]'"):
        find_target("tensorrt-rtx")


def test_aoti_takes_no_options_of_tensorrt(tmp_path: Path) -> None:
    model, x, out = nn.Linear(2, 2).eval(), torch.randn(1, 2), tmp_path / "a.plan"
    with pytest.raises(PlanError, match="plugins none: a plan for the CPU calls our ops"):
        build(model, x, out, plugins="none", dynamic=None)
    with pytest.raises(PlanError, match="target aoti builds for the machine at hand: SM architectures are TensorRT's"):
        build(model, x, out, sms=[80], dynamic=None)
