"""token_matching: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.token_matching.cases import cases, compare
from planmill.kernels.routing.token_matching.partition import TokenPartition
from planmill.kernels.routing.token_matching.plan import MergePlan, make_plan
from planmill.kernels.routing.token_matching.reference import token_matching_reference

SPEC = OpSpec(
    schema="token_matching(Tensor metric, Tensor src, Tensor dst) -> (Tensor, Tensor)",
    outputs=lambda metric, src, dst: [
        ((metric.shape[0], src.shape[0]), torch.float32),
        ((metric.shape[0], src.shape[0]), torch.int32),
    ],
    reference=token_matching_reference,
    cases=cases,
    compare=compare,
    cpu="C++",
    cuda="_triton:launch",
    differentiable=False,
)
_op, _call = register(SPEC)


def match_tokens(metric: torch.Tensor, partition: TokenPartition, merges: int | None = None) -> MergePlan:
    """Decide which tokens are merged: each source into the destination it is most like, the most similar ones first.

    `target[s] = argmax over d in dst of <m[s] / |m[s]|, m[d] / |m[d]|>`; the `merges` sources of largest similarity go
    into their targets. Each entry of the batch has a plan of its own (the published protected mode reads entry 0 only).
    The n x m matrix is never stored. No gradient: the plan is a constant of the step.

    Similarities are those of float32 arithmetic: on the CPU rows are screened in 16-bit arithmetic under a proven bound
    and what could be the largest is evaluated again; on the GPU float32 rows go through three TF32 products and half
    ones through exact products with float32 sums (the published code rounds similarities to bfloat16).

    Args:
        metric: [B, N, C], float32, bfloat16 or float16, any strides; in FastVGGT the normalised input of the block, in
            ToMe the keys averaged over the heads.
        partition: which of the N tokens are sources and destinations, on the device of `metric`.
        merges: sources to merge; None: the partition's limit. More than there are sources means all of them, and then
            nothing is sorted.

    Returns:
        The plan, for `merge_tokens` and `unmerge_tokens`. Its shapes depend on the partition and `merges` alone, so
        nothing waits for the device. Ties go to the lower destination and the lower source. A zero token is equally
        similar (0) to everything. A token that holds NaN or infinity is never a target, unless every destination is
        such a one; as a source it counts as least similar, and where it must be merged it goes to the first
        destination.

    Raises:
        ValueError: wrong rank, another number of tokens than the partition's, another device, negative `merges`.
        TypeError: another dtype.

    Source: FastVGGT (Shen et al., 2025), token merging; ToMe (Bolya et al., ICLR 2023), bipartite soft matching.
    """
    op = "token_matching"
    check_rank(op, "metric", metric, 3, "[B, N, C]")
    check_float(op, "metric", metric)
    if metric.shape[1] != partition.tokens:
        raise ValueError(f"{op}: metric must have the partition's {partition.tokens} tokens, got {list(metric.shape)}")
    if metric.device != partition.src.device:
        raise ValueError(f"{op}: partition must be on {metric.device} like metric, got {partition.src.device}")
    sources = partition.src.shape[0]
    if merges is not None and merges < 0:
        raise ValueError(f"{op}: merges must not be negative, got {merges}")
    similarity, position = (_op if is_compiling() else _call)(metric.detach(), partition.src, partition.dst)
    return make_plan(similarity, position, partition, min(partition.limit if merges is None else merges, sources))
