"""A model repository that Triton Inference Server would read: its published schema parses it, its calls are imitated.

tritonclient (BSD-3-Clause) brings the schema.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from google.protobuf import text_format
from torch import nn
from tritonclient.grpc import model_config_pb2

from planmill.cli import main
from planmill.engine import Manifest, Plan, PlanError
from planmill.errors import PlanmillError
from planmill.serving.triton_repository import RepositorySettings, config, write_repository


def parse(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_repository(judge_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "models"
    arguments = ["planmill", "export-server", judge_plan.path, "--out", out, "--instances", 2, "--threads", 1, "--json"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["1/model.py", "1/planmill.plan", "config.pbtxt"]
    assert (out / "judge/1/planmill.plan").read_bytes() == judge_plan.path.read_bytes()
    assert [path.name for path in out.iterdir()] == ["judge"]
    read = parse((out / "judge/config.pbtxt").read_text())
    assert (read.name, read.backend, read.platform, read.max_batch_size) == ("judge", "python", "", 16)
    assert [(x.name, x.data_type, list(x.dims)) for x in read.input] == [("x", model_config_pb2.TYPE_FP32, [3, 8, 8])]
    scores, label = read.output
    assert (scores.name, list(scores.dims), scores.HasField("reshape")) == ("scores", [4], False)
    assert (label.name, label.data_type, list(label.dims)) == ("label", model_config_pb2.TYPE_INT64, [1])
    assert label.HasField("reshape")
    assert list(label.reshape.shape) == []
    assert list(read.dynamic_batching.preferred_batch_size) == [4]
    assert read.dynamic_batching.default_queue_policy.max_queue_size == 256
    assert [(g.kind, g.count) for g in read.instance_group] == [(model_config_pb2.ModelInstanceGroup.KIND_CPU, 2)]
    assert read.parameters["threads"].string_value == "1"
    with pytest.raises(PlanmillError, match="exists already"):
        write_repository(judge_plan.path, out)
    with pytest.raises(PlanmillError, match="cannot be a model's name"):
        write_repository(judge_plan.path, out, "../up")


def changed(plan: Plan, **fields: Any) -> Plan:
    return Plan(plan.path, Manifest.model_validate(plan.manifest.model_dump() | fields))


def test_other_plans(judge_plan: Plan) -> None:
    manifest: dict[str, Any] = judge_plan.manifest.model_dump()
    (x,), (scores, label) = manifest["inputs"], manifest["outputs"]
    still = config(changed(judge_plan, outputs=[scores | {"shape": [16, 4]}]), "m", RepositorySettings())
    read = parse(still)  # a size that does not follow the batch: no batching, every size in full
    assert (read.max_batch_size, list(read.input[0].dims), read.HasField("dynamic_batching")) == (
        0,
        [-1, 3, 8, 8],
        False,
    )
    odd = config(changed(judge_plan, inputs=[x | {"name": 'a"b\\c', "dtype": "bfloat16"}]), "m", RepositorySettings())
    assert (parse(odd).input[0].name, parse(odd).input[0].data_type) == ('a"b\\c', model_config_pb2.TYPE_BF16)
    engine = parse(config(changed(judge_plan, target="tensorrt", ops=[]), "m", RepositorySettings()))
    assert (engine.platform, engine.backend) == ("tensorrt_plan", "")
    assert engine.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    for target, ops in (("tensorrt", ["planmill::knn"]), ("tensorrt-rtx", [])):
        assert parse(config(changed(judge_plan, target=target, ops=ops), "m", RepositorySettings())).backend == "python"
    with pytest.raises(PlanError, match="label is complex64, which Triton"):
        config(changed(judge_plan, outputs=[label | {"dtype": "complex64"}]), "m", RepositorySettings())
    sizes = {"batch": {"minimum": 2, "optimum": 4, "maximum": 16}}
    with pytest.raises(PlanError, match="build it with --batch 1:4:16"):
        config(changed(judge_plan, dynamic=sizes), "m", RepositorySettings())


class FakeTensor:
    """What the server passes: a name and a NumPy array."""

    def __init__(self, name: str, array: numpy.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> numpy.ndarray:
        self.array.flags.writeable = False  # as the server's is
        return self.array


def test_the_model_that_the_server_loads(
    judge: nn.Module, judge_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_repository(judge_plan.path, tmp_path, "judge-2")
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.Tensor = FakeTensor
    utils.TritonError = lambda message: message
    utils.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(tensors=output_tensors, error=error)
    utils.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    spec = importlib.util.spec_from_file_location("served_model", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    threads = torch.get_num_threads()
    settings = {"parameters": {"threads": {"string_value": str(threads)}}}
    model.initialize({"model_repository": str(folder), "model_version": "1", "model_config": json.dumps(settings)})
    batches = [torch.randn(rows, 3, 8, 8) for rows in (1, 9, 4, 3)]  # 14 samples share a call, 3 are the next
    requests = [{"x": FakeTensor("x", x.numpy())} for x in batches]
    requests.insert(1, {"x": FakeTensor("x", numpy.zeros((1, 3, 8, 9), numpy.float32))})
    responses = model.execute(requests)
    model.finalize()
    assert "expected float32 (batch, 3, 8, 8), got float32 (1, 3, 8, 9)" in responses.pop(1).error
    for x, response in zip(batches, responses, strict=True):
        assert [tensor.name for tensor in response.tensors] == ["scores", "label"]
        with torch.no_grad():
            wanted = judge(x)
        torch.testing.assert_close(torch.tensor(response.tensors[0].as_numpy()), wanted["scores"], atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.tensor(response.tensors[1].as_numpy()), wanted["label"])
