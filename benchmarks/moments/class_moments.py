"""class_moments against a PyTorch index_add formula. Error: of means and scatter, by the deviation of a channel."""

from collections.abc import Callable

import torch

from planmill.kernels.moments import average_by_class

from ..cases import Case, Draw, Goal, Peer, plain


def labelled(rows: int, width: int, classes: int) -> Callable[[Draw], tuple]:
    """Classes in random order, their means as far apart as their rows are."""

    def make(draw: Draw) -> tuple:
        labels = torch.randint(0, classes, (rows,), generator=draw.generator).to(draw.device)
        means = draw.normal(classes, width)
        return (draw.normal(rows, width) + means[labels], labels, classes)

    return make


def index_add(x: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, ...]:
    """Sums by index_add, then the product of the centred rows."""
    x = x.float()
    counts = torch.bincount(labels, minlength=classes)
    means = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x) / counts.clamp_min(1)[:, None]
    z = x - means[labels]
    return counts, means, z.T @ z


def check(args: tuple, result: tuple[torch.Tensor, ...]) -> float:
    """All means and 64 random channels of the scatter, against float64."""
    x, labels, classes = args
    counts, means, scatter = result
    n = torch.bincount(labels, minlength=classes)
    if not torch.equal(counts.long(), n):
        return torch.nan
    truth = x.new_zeros(classes, x.shape[1], dtype=torch.float64).index_add_(0, labels, x.double())
    truth /= n.clamp_min(1)[:, None]
    chosen = torch.randperm(x.shape[1])[:64].to(x.device)
    z = x[:, chosen].double() - truth[:, chosen][labels]
    product = z.T @ z
    deviation = product.diagonal().sqrt()
    error = (scatter[chosen][:, chosen].double() - product) / (deviation[:, None] * deviation)
    return max(float(error.abs().max()), float((means - truth).abs().max()))


CASES = [
    Case(
        op="class_moments",
        id="N50000-d512-K1000",
        make=labelled(50000, 512, 1000),
        small=labelled(500, 64, 10),
        ours=average_by_class,
        peers={"torch index_add": Peer(plain(index_add))},
        check=check,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5},
        flops=lambda x, labels, classes: x.shape[0] * x.shape[1] * (x.shape[1] + 1),
        dtypes=(torch.float32, torch.bfloat16),
        goals=(Goal("ratio", 3),),
        memory=True,
    )
]
