"""Target openvino: the same plan file and session, other code inside. OpenVINO is Apache-2.0."""

import random
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, PlanError, Session, build, capture
from planmill.engine.targets import Options, find_target, openvino
from planmill.kernels.neighbors import score_mutually

SMALL = DynamicDim("batch", 1, 3, 8)


class Several(nn.Module):
    """Images [B, 3, 9, 9] and counts [B] -> a map, a score and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.first(x)).relu()
        rows = self.second(y.mean((2, 3))) * count[:, None]
        return {"map": y.sum(1), "best": rows.argmax(1), "any": (rows > 0).any(1), "rows": rows}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of `Several` and nothing else of the model."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("openvino") / "a.plan"
    model = Several().eval()
    built = build(model, [torch.randn(2, 3, 9, 9), torch.tensor([1, 5])], path, target="openvino", dynamic=SMALL)
    assert built.manifest.target == "openvino"
    assert built.manifest.rewrites == ["affine_into_output"]
    assert [payload.name for payload in built.manifest.payloads] == ["openvino.zip"]
    assert built.manifest.receipt.verified == "executed"
    return path


@torch.no_grad()
def test_a_session_computes_what_the_model_does(plan: Path) -> None:
    torch.manual_seed(0)
    model = Several().eval()
    with Session(plan) as session:
        for batch in (1, 8, 3):
            x, count = torch.randn(batch, 3, 9, 9), torch.arange(batch)
            wanted = model(x, count)
            got = session.run({"x": x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), "count": count})
            assert got.keys() == wanted.keys()
            for name in wanted:
                torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)
        kept = session.run([x, count])["rows"]
        before = kept.clone()
        session.run([x + 1, count + 1])
        assert kept.equal(before)  # outputs belong to the caller
        with pytest.raises(PlanError, match="batch must be 1 to 8"):
            session.run([torch.randn(9, 3, 9, 9), torch.arange(9)])


def test_threads_do_not_mix_their_inputs(plan: Path) -> None:
    with Session(plan) as session:
        inputs = [(torch.randn(1 + i % 3, 3, 9, 9), torch.arange(1 + i % 3)) for i in range(4)]
        wanted = [session.run(pair)["rows"] for pair in inputs]
        wrong: list[int] = []

        def work(index: int) -> None:
            wrong.extend(index for _ in range(20) if not session.run(inputs[index])["rows"].equal(wanted[index]))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_bf16_plans_keep_the_boundary(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(3, 16)
    build(model, x, tmp_path / "a.plan", target="openvino", precision="bf16", dynamic=SMALL)
    with Session(tmp_path / "a.plan") as session, torch.no_grad():
        got = session.run(x)["output"]
        assert got.dtype == torch.float32
        assert (got - model(x)).abs().max() < 0.05 * model(x).abs().max()


def test_what_openvino_does_not_know_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return score_mutually(x)

    class Roots(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x @ x.mT)

    with pytest.raises(PlanError, match="does not know op planmill::mutual_score: build with target aoti"):
        build(Ours().eval(), torch.randn(3, 4, 5), tmp_path / "a.plan", target="openvino", dynamic=None)
    with pytest.raises(
        PlanError,
        match=r"cannot translate the model: No conversion .* aten._linalg_eigh.default: build with target aoti",
    ):
        build(Roots().eval(), torch.randn(3, 4, 5), tmp_path / "a.plan", target="openvino", dynamic=None)
    with pytest.raises(PlanError, match="input is bfloat16; give the model float32 inputs and outputs"):
        build(nn.ReLU().eval(), torch.ones(2, 3).bfloat16(), tmp_path / "a.plan", target="openvino", dynamic=None)
    (tmp_path / "b.zip").write_bytes(b"nothing")
    target = find_target("openvino")
    with pytest.raises(PlanError, match="OpenVINO model cannot be loaded"):
        target.load_payload(tmp_path / "b.zip")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PlanError, match=r"pip install 'planmill\[openvino\]'"):
        target.compile_program(capture(nn.ReLU().eval(), torch.ones(2, 3)), tmp_path, Options())
    assert not list(tmp_path.glob("*.plan"))


def test_a_damaged_payload_is_one_error(tmp_path: Path) -> None:
    """Any byte changed, in the zip's own tables above all: read, or refused by one PlanError."""
    path, rng = tmp_path / "openvino.zip", random.Random(0)
    members = {"model.xml": "<net/>", "model.bin": "weights", "settings.json": '{"precision": "f32"}'}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    whole = path.read_bytes()
    refused = 0
    for _ in range(1000):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + rng.randbytes(rng.choice([1, 1, 4])) + whole[at + 1 :])
        try:
            assert openvino._unpacked(path)[2] in ("f32", "bf16")
        except PlanError as error:
            refused += "OpenVINO model cannot be loaded" in str(error)
    assert refused > 500
