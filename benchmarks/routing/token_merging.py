"""Token merging, the whole step of a FastVGGT block: match, merge one or three tensors, unmerge one.

Error: largest difference of a merged or unmerged row from float64, where the match is not in doubt: destinations that a
source reaches within 1e-5 of its best are left out, since either match is right.
"""

from collections.abc import Callable

import torch

from planmill.kernels.routing import TokenPartition, match_tokens, merge_tokens, unmerge_tokens

from ..cases import Case, Draw, Goal, Peer

Result = tuple[list[torch.Tensor], torch.Tensor]
CHUNK = 1024
DOUBT = 1e-5
CAREFUL = "torch float32: normalize, mm + max in chunks, index_add, gather"


def make(frames: int, height: int, width: int, channels: int, tensors: int) -> Callable[[Draw], tuple]:
    """A metric whose tokens lie around 64 centres, and the tensors to merge."""

    def draw_all(draw: Draw) -> tuple:
        partition = TokenPartition.for_frames(frames, height, width, device=draw.device)
        metric = draw.clusters(1, partition.tokens, channels, centers=draw.centers(64, channels))
        return partition, metric, *(draw.normal(1, partition.tokens, channels) for _ in range(tensors))

    return draw_all


def step(partition: TokenPartition, metric: torch.Tensor, *tensors: torch.Tensor) -> Result:
    """Ours."""
    plan = match_tokens(metric, partition)
    merged = [merge_tokens(x, plan) for x in tensors]
    return merged, unmerge_tokens(merged[0], plan)


def careful(partition: TokenPartition, metric: torch.Tensor, *tensors: torch.Tensor) -> Callable[[], Result]:
    """PyTorch with the partition's indices at hand, protected tokens never matched, and halves converted beforehand."""
    src, dst, protected = partition.src.long(), partition.dst.long(), partition.protected.long()
    m, given = metric[0].float(), [x[0].float() for x in tensors]

    def call() -> Result:
        unit = torch.nn.functional.normalize(m, dim=1)
        ours, others = unit[src], unit[dst].T
        target = torch.cat([(part @ others).max(1).indices for part in ours.split(CHUNK)])
        count = torch.ones(len(dst), device=m.device).index_add_(0, target, torch.ones_like(target, dtype=m.dtype))
        merged = []
        for x in given:
            mean = x[dst].index_add_(0, target, x[src]).div_(count[:, None])
            merged.append(torch.cat([mean, x[protected]])[None])
        row = torch.empty(len(m), dtype=torch.long, device=m.device)
        row[dst] = torch.arange(len(dst), device=m.device)
        row[src] = target
        row[protected] = torch.arange(len(dst), len(dst) + len(protected), device=m.device)
        return merged, merged[0][:, row]

    return call


def check(args: tuple, result: Result) -> float:
    """The first merged tensor and the unmerged one in float64."""
    partition, metric, x, *_ = args
    merged, back = result
    src, dst = partition.src.long(), partition.dst.long()
    unit = torch.nn.functional.normalize(metric[0].double(), dim=1)
    best = (unit[src] @ unit[dst].T).topk(2, 1)
    target = best.indices[:, 0]
    sure = torch.ones(len(dst), dtype=torch.bool, device=x.device)
    sure[best.indices[best.values[:, 0] - best.values[:, 1] < DOUBT].flatten()] = False
    count = torch.bincount(target, minlength=len(dst)) + 1
    want = x[0, dst].double().index_add(0, target, x[0, src].double()) / count[:, None]
    if merged[0].shape != (1, len(dst) + len(partition.protected), x.shape[2]) or not bool(sure.any()):
        return torch.nan
    wrong = (merged[0][0, : len(dst)].double() - want)[sure].abs().max()
    wrong_back = (back[0, src].double() - want[target])[sure[target]].abs().max()
    kept = (back[0, partition.protected.long()].double() - x[0, partition.protected.long()].double()).abs().max()
    return float(torch.stack([wrong, wrong_back, kept]).max())


def _case(name: str, tensors: int) -> Case:
    return Case(
        op="token_merging",
        id=f"S8-28x37-C1024-{name}",
        make=make(8, 28, 37, 1024, tensors),
        small=make(2, 8, 9, 256, tensors),
        ours=step,
        peers={CAREFUL: Peer(careful)},
        check=check,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
        flops=lambda partition, metric, *tensors: 2.0 * len(partition.src) * len(partition.dst) * metric.shape[2],
        dtypes=(torch.float32, torch.bfloat16),
        goals=(Goal("ratio", 1.5, CAREFUL, torch.float32),),
        memory=True,
    )


CASES = [_case("one", 1), _case("qkv", 3)]
