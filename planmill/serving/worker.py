"""What runs in a worker process: a session that serves batches of requests."""

import json
from collections.abc import Sequence

import torch

from planmill.engine import PlanError, Session
from planmill.engine.batching import find_batch, plan_groups, run_together
from planmill.engine.errors import first_line
from planmill.serving.payloads import JSON, BadRequestError, ImageSettings, decode, encode

Request = tuple[bytes, str, str]  # body, its content type, content type of the answer
Response = tuple[int, str, bytes]  # status, content type, body


class Worker:
    """Opens a plan, and answers requests in batches.

    Args:
        path: of the plan.
        images: how images become inputs.
        threads: that a call of the plan uses.
    """

    def __init__(self, path: str, images: ImageSettings, threads: int) -> None:
        self._threads = threads
        torch.set_num_threads(threads)  # some targets read it when a plan is loaded
        self._session = Session(path)
        self._images = images
        self._names = [spec.name for spec in self._session.outputs]
        try:
            self._largest = find_batch(self._session.plan)[1]
        except PlanError:  # a plan of fixed sizes: each request is a call
            self._largest = 0

    def answer(self, requests: Sequence[Request]) -> list[Response]:
        """Answer each request; none can spoil another. In several threads, calls of the plan take turns."""
        torch.set_num_threads(self._threads)  # OpenMP keeps it per calling thread
        results: list[Response | None] = [None] * len(requests)
        inputs: dict[int, list[torch.Tensor]] = {}
        for i, (body, kind, _) in enumerate(requests):
            try:
                tensors = decode(body, kind, self._session.inputs, self._images)
                self._session.check(*tensors)
                inputs[i] = tensors
            except BadRequestError as error:
                results[i] = refusal(error.status, error.message)
            except PlanError as error:
                results[i] = refusal(400, str(error))
            except Exception as error:  # of a library that reads bodies: it may cost this request, never the batch
                results[i] = refusal(400, f"the body cannot be read: {type(error).__name__}")
        for group in plan_groups(inputs, self._largest):
            outputs = run_together(self._session, [inputs[i] for i in group])
            for i, output in zip(group, outputs, strict=True):
                results[i] = self._respond(output, requests[i][2])
        return [result for result in results if result is not None]

    def _respond(self, outputs: tuple[torch.Tensor, ...] | Exception, kind: str) -> Response:
        if isinstance(outputs, Exception):
            return refusal(422, f"the plan cannot compute this input: {first_line(outputs)[:300]}")
        try:
            return 200, kind, encode(dict(zip(self._names, outputs, strict=True)), kind)
        except BadRequestError as error:
            return refusal(error.status, error.message)


def refusal(status: int, message: str) -> Response:
    """An error as a response."""
    return status, JSON, json.dumps({"error": message}).encode()
