"""`planmill build`, `run` and `info`: what a script reads, and what a mistake gets."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from planmill.cli import main
from planmill.cli.build import _examples, _own_inputs
from planmill.engine import DynamicDim, Session, capture
from planmill.engine.models import load_model

FACTORY = """
import torch
from neighbour import WIDTH

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(50, WIDTH)
        self.linear = torch.nn.Linear(WIDTH, 3)
    def forward(self, tokens, x):
        return {"logits": self.linear(self.table(tokens).mean(1) + x)}

def needs(argument): ...
def number(): return 3
"""

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["planmill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "model.py").write_text(FACTORY)
    (folder / "neighbour.py").write_text("WIDTH = 4\n")
    torch.manual_seed(0)
    state = {"table.weight": torch.randn(50, 4), "linear.weight": torch.randn(3, 4), "linear.bias": torch.randn(3)}
    save_file(state, folder / "weights.safetensors")
    torch.save({"state_dict": state}, folder / "weights.pt")
    save_file({**state, "linear.bias": torch.randn(5)}, folder / "other.safetensors")
    save_file({"linear.bias": torch.randn(3), "extra": torch.randn(3)}, folder / "few.safetensors")
    return folder


@pytest.fixture(scope="module")
def built(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A plan built by the command as a user starts it, from another directory, and what it printed."""
    script = Path(sys.executable).with_name("planmill")
    files = [folder / "model.py:Model", "--out", folder / "m.plan", "--weights", folder / "weights.pt"]
    options = ["--input", "int64:7:50", "--input", "4", "--batch", "1:3:6", "--json"]
    arguments = [str(part) for part in (script, "build", *files, *options)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return folder / "m.plan", json.loads(done.stdout)


def test_build_prints_the_manifest_and_nothing_else(built: tuple[Path, dict[str, Any]]) -> None:
    _, manifest = built
    assert [(i["name"], i["dtype"], i["shape"]) for i in manifest["inputs"]] == [
        ("tokens", "int64", ["batch", 7]),
        ("x", "float32", ["batch", 4]),
    ]
    assert manifest["outputs"][0]["name"] == "logits"
    assert manifest["dynamic"] == {"batch": {"minimum": 1, "optimum": 3, "maximum": 6}}
    assert manifest["receipt"]["outputs"][0]["max_rel"] < 1e-5


def test_weights_are_in_the_plan(built: tuple[Path, dict[str, Any]], folder: Path) -> None:
    state = torch.load(folder / "weights.pt", weights_only=True)["state_dict"]
    tokens, x = torch.randint(0, 50, (2, 7)), torch.randn(2, 4)
    mean = state["table.weight"][tokens].mean(1) + x
    wanted = mean @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(Session(built[0])(tokens, x), wanted)


def test_info(built: tuple[Path, dict[str, Any]], cli: Cli) -> None:
    code, out, _ = cli("info", built[0], "--json")
    assert code == 0
    assert json.loads(out) == built[1]
    code, out, _ = cli("info", built[0])
    assert code == 0
    for word in ("Model", "aoti, fp32", "tokens: int64 (batch, 7)", "batch: 1 to 6, tuned for 3", "receipt"):
        assert word in out


def test_run_random(built: tuple[Path, dict[str, Any]], cli: Cli) -> None:
    code, out, _ = cli("run", built[0], "--repeat", 4, "--json", "--batch", 2)
    assert code == 0
    result = json.loads(out)
    assert result["outputs"] == {"logits": {"dtype": "float32", "shape": [2, 3]}}
    assert 0 < result["p20_ms"] <= result["p50_ms"] <= result["p80_ms"]
    assert result["repeat"] == 4
    code, out, _ = cli("run", built[0], "--repeat", 1)
    assert code == 0
    assert "[3, 3]" in out
    assert "p50" in out


def test_run_files(built: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path) -> None:
    tokens, x = torch.randint(0, 50, (2, 7)), torch.randn(2, 4)
    numpy.save(tmp_path / "t.npy", tokens.numpy())
    numpy.save(tmp_path / "x.npy", x.numpy())
    numpy.savez(tmp_path / "both.npz", x=x.numpy(), tokens=tokens.numpy())
    save_file({"x": x, "tokens": tokens}, tmp_path / "both.safetensors")
    wanted = Session(built[0]).run({"tokens": tokens, "x": x})["logits"]
    ways: list[list[object]] = [
        [tmp_path / "t.npy", tmp_path / "x.npy"],
        [f"x={tmp_path / 'x.npy'}", tmp_path / "t.npy"],
        [tmp_path / "both.npz"],
        [tmp_path / "both.safetensors"],
    ]
    for files in ways:
        inputs = [part for file in files for part in ("--input", file)]
        code, _, err = cli("run", built[0], *inputs, "--repeat", 1, "--out", tmp_path / "y.npz")
        assert code == 0, err
        assert torch.equal(torch.from_numpy(numpy.load(tmp_path / "y.npz")["logits"]), wanted)


BUILD_MISTAKES = [
    (["{f}/model.py"], "say which function or class"),
    (["{f}/none.py:Model"], "none.py: no such file"),
    (["{f}/model.py:Nothing"], "has no function or class named 'Nothing'"),
    (["{f}/model.py:needs"], "must work without arguments"),
    (["{f}/model.py:number"], "must give an nn.Module, gave int"),
    (["no.such.module:Model"], "cannot be imported"),
    (["vit_enormous_patch9"], "timm has no model named 'vit_enormous_patch9'"),
    (["resnet18"], "give its weights (--weights FILE), or allow random ones (--random-weights)"),
    (["{f}/model.py:Model", "--target", "onnx"], "no target named 'onnx'; there is aoti, tensorrt-rtx, tensorrt"),
    (["{f}/model.py:Model", "--device", "tpu"], "target aoti builds plans for cpu and cuda, got device 'tpu'"),
    (["{f}/model.py:Model", "--precision", "int8"], "precision must be fp32, bf16 or fp16, got 'int8'"),
    (["{f}/model.py:Model", "--sm", "80,9x"], "--sm must be a list of GPU architectures"),
    (["{f}/model.py:Model", "--plugins", "all"], "--plugins must be python, aot, none, got 'all'"),
    (["{f}/model.py:Model", "--max-rel", "-1"], "--max-rel must be a number from 0"),
    (["{f}/model.py:Model", "--cosine", "nan"], "--cosine must be -1 to 1"),
    (["{f}/model.py:Model", "--batch", "4:2:8"], "--batch must satisfy MIN <= OPT <= MAX"),
    (["{f}/model.py:Model", "--batch", "0"], "--batch must be MIN:OPT:MAX"),
    (["{f}/model.py:Model", "--input", "3y4"], "--input must be [DTYPE:]SHAPE[:BELOW]"),
    (["{f}/model.py:Model", "--input", "float99:4"], "torch has no dtype 'float99'"),
    (["{f}/model.py:Model"], "give the shape of each input"),
    (["{f}/model.py:Model", "--input", "int64:7:50"], "does not run on the example inputs: TypeError"),
    (["{f}/model.py:Model", "--weights", "{f}/none.pt"], "none.pt: no such file"),
    (["{f}/model.py:Model", "--weights", "{f}/model.py"], "no state dict that can be read safely"),
    (["{f}/model.py:Model", "--weights", "{f}/other.safetensors"], "size mismatch for linear.bias"),
    (["{f}/model.py:Model", "--weights", "{f}/few.safetensors"], "lacks table.weight, linear.weight"),
    (["{f}/model.py:Model", "--weights", "{f}/weights.pt", "--random-weights"], "choose one"),
]


@pytest.mark.parametrize(("arguments", "message"), BUILD_MISTAKES, ids=[message[:24] for _, message in BUILD_MISTAKES])
def test_build_mistakes(cli: Cli, folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = cli("build", *(a.replace("{f}", str(folder)) for a in arguments), "--out", tmp_path / "a.plan")
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_build_destinations(cli: Cli, folder: Path, tmp_path: Path) -> None:
    model = f"{folder}/model.py:Model"
    for out, message in ((tmp_path, "name ends in .plan"), (tmp_path / "no" / "a.plan", "create it first")):
        code, _, err = cli("build", model, "--out", out)
        assert code == 2
        assert message in err


def test_run_mistakes(built: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", numpy.zeros((2, 5), numpy.float32))
    numpy.savez(tmp_path / "one.npz", x=numpy.zeros((2, 4), numpy.float32))
    numpy.save(tmp_path / "objects.npy", numpy.array([{}], dtype=object))
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing at all")
    plan, x = built[0], tmp_path / "x.npy"
    mistakes: list[tuple[list[object], str]] = [
        ([tmp_path / "no.plan"], "no.plan: no such file"),
        ([x], "x.npy: not a plan"),
        ([plan, "--batch", 7], "batch must be 1 to 6"),
        ([plan, "--input", "no.npy"], "no.npy: no such file"),
        ([plan, "--input", x, "--input", x], "input tokens: expected int64 (batch, 7), got float32 (2, 5)"),
        ([plan, "--input", tmp_path / "one.npz"], "the plan takes tokens, x; got x"),
        ([plan, "--input", tmp_path / "objects.npy"], "cannot be read as numbers"),
        ([plan, "--input", tmp_path / "bad.npy"], "cannot be read as numbers"),
        ([plan, "--input", tmp_path / "bad.safetensors"], "no safetensors file"),
        ([plan, "--input", plan], "inputs are .npy, .npz or .safetensors files"),
        ([plan, "--input", f"x={x}", "--input", f"x={x}"], "input x is given twice"),
        ([plan, "--input", x, "--batch", 2], "--batch is for random inputs"),
        ([plan, "--out", tmp_path / "no" / "y.npz"], "must be the name of an .npz file"),
    ]
    for arguments, message in mistakes:
        code, out, err = cli("run", *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in " ".join(err.split())
        assert "Traceback" not in err


def test_commands_do_not_import_torch_for_help() -> None:
    program = (
        "import sys; from planmill.cli import app; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_timm_model_knows_its_input() -> None:
    model = load_model("test_vit3.r160_in1k", random_weights=True)
    examples = _examples(_own_inputs(model), 2)
    captured = capture(model, examples, dynamic=DynamicDim("batch", 1, 2, 2))
    assert captured.inputs[0].shape == ["batch", 3, 160, 160]
    assert captured.layout == "contiguous"
