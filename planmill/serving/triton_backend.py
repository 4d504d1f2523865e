"""The model of a plan in Triton Inference Server's Python backend; `model.py` of a repository imports it.

`triton_python_backend_utils` exists only inside the server, so it is imported when the server calls.
"""

import json
from pathlib import Path
from typing import Any

import numpy
import torch

from planmill.engine import PlanError, Session
from planmill.engine.batching import find_batch, plan_groups, run_together
from planmill.engine.errors import first_line

PLAN = "planmill.plan"


class TritonPythonModel:
    """One instance: opens the plan beside `model.py`, and runs what the server's dynamic batching put together."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the plan; the server does not load the model where this raises."""
        folder = Path(args["model_repository"]) / args["model_version"]
        threads = json.loads(args["model_config"]).get("parameters", {}).get("threads", {}).get("string_value")
        if threads:
            torch.set_num_threads(int(threads))
        self._session = Session(folder / PLAN)
        try:
            self._largest = find_batch(self._session.plan)[1]
        except PlanError:
            self._largest = 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in order; an error is the response of the request that it belongs to."""
        import triton_python_backend_utils as pb_utils

        inputs: dict[int, list[torch.Tensor]] = {}
        results: dict[int, Any] = {}
        for i, request in enumerate(requests):
            given = [pb_utils.get_input_tensor_by_name(request, spec.name) for spec in self._session.inputs]
            tensors = [
                _to_torch(tensor, spec.torch_dtype) for tensor, spec in zip(given, self._session.inputs, strict=True)
            ]
            try:
                self._session.check(*tensors)
                inputs[i] = tensors
            except PlanError as error:
                results[i] = error
        for group in plan_groups(inputs, self._largest):
            results.update(zip(group, run_together(self._session, [inputs[i] for i in group]), strict=True))
        return [self._respond(results[i], pb_utils) for i in range(len(requests))]

    def finalize(self) -> None:
        """Free the plan."""
        self._session.close()

    def _respond(self, result: tuple[torch.Tensor, ...] | Exception, pb_utils: Any) -> Any:
        if isinstance(result, Exception):
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(first_line(result)))
        named = zip(self._session.outputs, result, strict=True)
        return pb_utils.InferenceResponse(output_tensors=[_from_torch(spec.name, x, pb_utils) for spec, x in named])


def _to_torch(tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    """NumPy has no bfloat16, and not every release of the server passes booleans as DLPack."""
    if dtype == torch.bfloat16:
        return torch.from_dlpack(tensor.to_dlpack())
    return torch.from_numpy(numpy.array(tensor.as_numpy()))


def _from_torch(name: str, x: torch.Tensor, pb_utils: Any) -> Any:
    if x.dtype == torch.bfloat16:
        return pb_utils.Tensor.from_dlpack(name, x.__dlpack__())
    return pb_utils.Tensor(name, x.numpy())
