"""Ray, found and started; actors that come back, and what they are made from."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planmill.distributed.blocks import Block
from planmill.errors import PlanmillError
from planmill.ray_settings import keep_ray_private

Source = torch.Tensor | Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Placement:
    """Where shards live.

    Args:
        cpus: processors of each; also the threads of its kernels.
        restarts: how often a lost process is started again.
        start_s: how long all may take to start, loading included.
    """

    cpus: int = 1
    restarts: int = 8
    start_s: float = 600.0


ANYWHERE = Placement()


def connect(address: str | None = None, *, cpus: int | None = None, store_bytes: int | None = None) -> Any:
    """The module `ray`, connected: to the cluster at `address`, or to one that is started in this process.

    A connection that is there already is used as it is.

    Args:
        address: of a running cluster, e.g. "10.0.0.1:6379"; None: start one on this machine alone.
        cpus: of the started one; None: all.
        store_bytes: of shared memory for the shards of the started one; None: what Ray takes, 30 % of the memory.

    Raises:
        PlanmillError: the extra `serve` is not installed, or nothing answers at the address.
    """
    if address is None:
        keep_ray_private()
    try:
        import ray
    except ImportError as error:
        raise PlanmillError(f"planmill.distributed needs Ray ({error}): pip install 'planmill[serve]'") from error
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": store_bytes}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlanmillError(f"cannot join a Ray cluster at {address or 'this machine'}: {error}") from error
    return ray


def split(ray: Any, op: str, data: torch.Tensor | Sequence[Source], shards: int | None, cpus: int) -> list[Source]:
    """One source per shard: parts of a tensor, about equally long and none of them empty, or the given ones.

    Raises:
        ValueError: no shards, or a number of shards beside a list of sources.
    """
    if shards is not None and shards < 1:
        raise ValueError(f"{op}: shards must be at least 1, got {shards}")
    if isinstance(data, torch.Tensor):
        count = shards or max(1, int(ray.cluster_resources().get("CPU", 1)) // max(1, cpus))
        return list(data.detach().tensor_split(max(1, min(count, len(data)))))
    if shards is not None and shards != len(data):
        raise ValueError(f"{op}: {len(data)} sources make {len(data)} shards, got shards={shards}")
    if not data:
        raise ValueError(f"{op}: no sources")
    return list(data)


def store(ray: Any, source: Source) -> Any:
    """A reference to the block of a source, in the shared memory of some node.

    A tensor is put there. A callable is a task: should its node be lost, Ray runs it again elsewhere. It asks for no
    processor, because all may be taken by shards when that happens.
    """
    if isinstance(source, torch.Tensor):
        return ray.put(Block.of(source))
    return ray.remote(num_cpus=0, max_retries=-1)(_load).remote(source)


def _load(source: Callable[[], torch.Tensor]) -> Block:
    return Block.of(source())


def start_actors(ray: Any, kind: type, arguments: Sequence[tuple], placement: Placement) -> list[Any]:
    """One actor of class `kind` per tuple of arguments, spread over the nodes.

    Where the process of an actor is lost, Ray starts it again with the same arguments, whose references lead to the
    data, and repeats the calls that were not answered.

    Raises:
        PlanmillError: more processors are needed than the cluster has.
    """
    needed, there = placement.cpus * len(arguments), int(ray.cluster_resources().get("CPU", 0))
    if needed > there:
        raise PlanmillError(f"{len(arguments)} shards need {needed} processors; the Ray cluster has {there}")
    actor = ray.remote(
        num_cpus=placement.cpus,
        max_restarts=placement.restarts,
        max_task_retries=placement.restarts,
        scheduling_strategy="SPREAD",
    )(kind)
    return [actor.remote(*each, placement.cpus) for each in arguments]


def collect(ray: Any, references: Sequence[Any], timeout_s: float | None = None) -> list[Any]:
    """What the calls returned; what one of them raised is raised here.

    Raises:
        PlanmillError: a shard was lost more often than it is started again, its data cannot be had, or time is up.
    """
    try:
        return ray.get(list(references), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise PlanmillError(f"shards did not start within {timeout_s} s: is the Ray cluster full?") from error
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
        lines = str(error).strip().splitlines()
        why = lines[-1 if "creation task" in lines[0] else 0]  # where it could not start, the traceback's last line
        raise PlanmillError(f"a shard was lost for good: {why.strip()}") from error


def finish(ray: Any, references: Sequence[Any]) -> None:
    """Wait until all calls have ended, however; what they returned stays where it is."""
    ray.wait(list(references), num_returns=len(references), fetch_local=False)


def stop_actors(ray: Any, actors: Sequence[Any]) -> None:
    """End the processes."""
    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)
