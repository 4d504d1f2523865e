"""cluster_members: schema, shape rule, checks, comparison and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.cluster_members.cases import cases
from planmill.kernels.attention.cluster_members.reference import cluster_members_reference, cluster_scores
from planmill.kernels.common.checks import check_device, check_float, check_int32_range, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec


def same_choice(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Members are ascending and distinct, and score as well as those of the definition: near ties may fall either way.

    Raises:
        AssertionError: they do not.
    """
    (found,), (chosen,) = got, want
    assert found.shape == chosen.shape
    assert (found[..., 1:] > found[..., :-1]).all(), "members are not ascending"
    if found.numel() == 0:
        return
    scores = cluster_scores(args[0], args[1])
    assert int(found.min()) >= 0
    assert int(found.max()) < scores.shape[3]
    a, b = (scores.gather(3, members.long()).sort(-1).values for members in (found, chosen))
    torch.testing.assert_close(a, b, atol=1e-6 + 1e-6 * float(args[1].nan_to_num().norm(dim=-1).max()), rtol=1e-6)


SPEC = OpSpec(
    schema="cluster_members(Tensor x, Tensor centroids, int window) -> Tensor",
    outputs=lambda x, centroids, window: [((x.shape[0], x.shape[1], centroids.shape[1], window), torch.int32)],
    reference=cluster_members_reference,
    cases=cases,
    cpu="C++",
    cuda="_triton:launch",
    compare=same_choice,
    differentiable=False,
)
_op, _call = register(SPEC)


def choose_members(x: torch.Tensor, centroids: torch.Tensor, window: int) -> torch.Tensor:
    """The tokens that belong to each cluster: the `window` tokens whose direction is nearest to its centroid.

    With S[b, h, n, c] = <x[b, h, n] / |x[b, h, n]|, centroids[h, c]>, the members of cluster c are the
    w' = min(window, N) tokens of largest S[b, h, :, c]. A token is in as many clusters as choose it, or in none.

    Nothing of size N x C is stored on the CPU; a GPU stores the scores of some clusters at a time.

    Args:
        x: [B, H, N, d], float32, bfloat16 or float16, any strides: queries or keys, normalised here (eps 1e-12).
        centroids: [H, C, d], float32, bfloat16 or float16: used as they are, not normalised.
        window: w, at least 1.

    Returns:
        [B, H, C, w'] int32, ascending. Of equal scores the lowest index wins; scores are float32, so two tokens that
        are nearer to each other than that may be exchanged between devices. A NaN score counts as -inf: such a token is
        chosen last.

    Raises:
        ValueError: wrong rank or shape, window below 1, another device, N of 2^31 or more.
        TypeError: another dtype.

    Source: Roy et al., "Efficient content-based sparse attention with routing transformers" (TACL 2021), section 4.1,
    as in the public routing-transformer package: top-w of each cluster, not the nearest cluster of each token. The
    published top-k leaves ties open.
    """
    op = "cluster_members"
    check_rank(op, "x", x, 4, "[B, H, N, d]")
    check_float(op, "x", x)
    check_rank(op, "centroids", centroids, 3, "[H, C, d]")
    check_float(op, "centroids", centroids)
    check_device(op, "centroids", centroids, "x", x)
    if centroids.shape[0] != x.shape[1] or centroids.shape[2] != x.shape[3]:
        needed = f"[{x.shape[1]}, C, {x.shape[3]}] like x"
        raise ValueError(f"{op}: centroids must be {needed}, got {list(centroids.shape)}")
    if window < 1:
        raise ValueError(f"{op}: window must be at least 1, got {window}")
    check_int32_range(op, "x", x.shape[2])
    return (_op if is_compiling() else _call)(x, centroids.float(), min(window, x.shape[2]))
