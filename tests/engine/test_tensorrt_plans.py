"""Whole plans of TensorRT-RTX: a model with one layer of every family, with our plugins and without."""

from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Plan, PlanError, Session, build
from planmill.engine.manifest import Plugins
from planmill.engine.plugins import PLUGIN_VERSION
from planmill.engine.targets import find_target
from planmill.engine.tensorrt.head import read_head
from planmill.kernels.attention import GatedLinearAttention
from planmill.kernels.moments import CovariancePooling
from planmill.kernels.neighbors import score_mutually
from planmill.kernels.routing import SoftMoE

BATCH = DynamicDim("batch", 2, 3, 6)
OPS = ("covariance", "expert_mixture", "gated_linear_attention", "matrix_root", "mutual_score", "slot_weights")


class Every(nn.Module):
    """float32 [B, 4, 8] -> classes [B, 5], covariances [B, 36], scores [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = GatedLinearAttention(8, heads=2, gate_rank=4)
        self.experts = SoftMoE(8, experts=2, slots=2)
        self.covariance = CovariancePooling(8, None, iterations=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x + self.attention(self.norm(x))
        x = x + self.experts(x)
        grid = x.transpose(1, 2).unflatten(2, (2, 2))
        return self.head(x.mean(1)), self.covariance(grid), score_mutually(x)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Every().eval()


@pytest.fixture(scope="module")
def with_plugins(model: nn.Module, plans: Path) -> Plan:
    path = plans / "plugins.plan"
    return build(model, torch.randn(3, 4, 8), path, target="tensorrt-rtx", sms=(80, 120), dynamic=BATCH)


def test_our_ops_are_plugins_in_the_plan(with_plugins: Plan, tmp_path: Path) -> None:
    said = with_plugins.manifest.tensorrt
    assert said is not None
    assert said.plugins == dict.fromkeys(OPS, PLUGIN_VERSION)
    assert said.layers["plugin_v3"] == len(OPS)
    assert (said.sms, said.version, said.opset) == ([80, 120], "1.7.1.116", 20)
    assert said.profile == {"x": ([2, 4, 8], [3, 4, 8], [6, 4, 8])}
    receipt = with_plugins.manifest.receipt
    assert receipt.verified == "onnx, not executed on device"
    assert "planmill::mutual_score" in receipt.proof
    assert max(output.max_rel for output in receipt.outputs) < 1e-5
    payload = with_plugins.extract(tmp_path)
    assert read_head(payload).sms == (80, 120)
    data = payload.read_bytes()
    assert all(name.encode() in data for name in OPS)


@pytest.mark.slow
def test_without_plugins_in_half_precision(model: nn.Module, tmp_path: Path) -> None:
    """The attention's Scan is one that TensorRT-RTX 1.7.1.116 gets wrong as it stands: see engine/tensorrt/loops.py."""
    plan = build(
        model, torch.randn(3, 4, 8), tmp_path / "a.plan",
        target="tensorrt-rtx", sms=(89,), precision="fp16", plugins="none", dynamic=BATCH,
    )  # fmt: skip
    said = plan.manifest.tensorrt
    assert said is not None
    assert said.plugins == {}
    assert "plugin_v3" not in said.layers
    assert said.layers["recurrence"] == 1
    assert max(output.max_rel for output in plan.manifest.receipt.outputs) < 1e-2


def test_loading_without_a_gpu_says_what_is_missing(with_plugins: Plan) -> None:
    with pytest.raises(PlanError, match=r"runs on an NVIDIA GPU, and torch finds none here.*--target aoti"):
        Session(with_plugins.path)


def test_a_payload_is_checked_before_the_gpu_is(with_plugins: Plan, tmp_path: Path) -> None:
    payload = with_plugins.extract(tmp_path)
    payload.write_bytes(payload.read_bytes()[:-1])
    with pytest.raises(PlanError, match="cut short"):
        find_target("tensorrt-rtx").load_payload(payload, with_plugins.manifest)


class Branched(nn.Module):
    """float32 [B, 8] -> float32 [B, 2]: an op of ours in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(7, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def near(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return torch.ops.planmill.knn(x, rows, 2, "l2", False, True)[0]

        def far(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return 2 * x[:, :2]

        return torch.cond(x.sum() > 0, near, far, (x, self.rows))


@pytest.mark.slow
@pytest.mark.parametrize("plugins", ["python", "none"])
def test_an_op_inside_a_branch(tmp_path: Path, plugins: Plugins) -> None:
    torch.manual_seed(0)
    path = tmp_path / "a.plan"
    plan = build(
        Branched().eval(), torch.randn(3, 8), path, target="tensorrt-rtx", sms=(89,), plugins=plugins, dynamic=BATCH
    )
    said = plan.manifest.tensorrt
    assert said is not None
    assert said.layers["condition"] == 1
    assert said.plugins == ({"knn": PLUGIN_VERSION} if plugins == "python" else {})
