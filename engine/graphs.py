"""CUDA graphs for a payload on a GPU: captured at the second call with the same input shapes, replayed from then on."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

_KEPT = 8  # sets of input shapes whose graphs are kept

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Device:
    """What a runner asks of the machine; the tests put the CPU in its place."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda", torch.cuda.current_device()))
    last: Any = None  # the stream of the call before

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A call's turn: on this device whatever the thread's is, and after what the call before put on its stream."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            if self.last is not None and self.last != stream:
                stream.wait_stream(self.last)
            self.last = stream
            yield

    def stream(self) -> int:
        """The current stream's handle."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` puts on the current stream; gives what replays it there."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            run()
        return graph.replay


@dataclass
class Graph:
    """A captured run: copy into `inputs`, call `replay`, read `outputs`; `owner` holds the memory between."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    replay: Callable[[], None]
    owner: Any = None


class Graphs:
    """The graphs of one payload, by the shapes of its inputs.

    Args:
        device: where it runs.
        run: a call without a graph.
        capture: the graph of a run on these inputs, which are the graph's own.
    """

    def __init__(
        self,
        device: Device,
        run: Callable[[list[torch.Tensor]], list[torch.Tensor]],
        capture: Callable[[list[torch.Tensor]], Graph],
    ) -> None:
        self.device, self._run, self._capture = device, run, capture
        self._seen: set[Shapes] = set()
        self._kept: OrderedDict[Shapes, Graph] = OrderedDict()

    def __len__(self) -> int:
        """How many graphs are kept."""
        return len(self._kept)

    def __call__(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run on inputs from either side; the outputs are new tensors on the device."""
        shapes = tuple(tuple(x.shape) for x in given)
        graph = self._kept.get(shapes)
        if graph is None:
            if shapes not in self._seen:  # most shapes that come once do not come again
                self._seen.add(shapes)
                return self._run(given)
            graph = self._kept[shapes] = self._record(given)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shapes)
        for mine, x in zip(graph.inputs, given, strict=True):
            mine.copy_(x, non_blocking=True)
        graph.replay()
        return [x.clone() for x in graph.outputs]  # the next replay overwrites its own

    def _record(self, given: list[torch.Tensor]) -> Graph:
        mine = [torch.empty(x.shape, dtype=x.dtype, device=self.device.device) for x in given]
        for m, x in zip(mine, given, strict=True):
            m.copy_(x)
        return self._capture(mine)
