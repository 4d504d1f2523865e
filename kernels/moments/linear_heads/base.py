"""LinearHead: what all closed-form classifiers share: a weight, a bias, and the Linear that they fold into."""

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.moments.class_moments import ClassMoments, average_by_class


class LinearHead(nn.Module):
    """Logits x W^T + b of features x, with x scaled to length one first where `unit` is set.

    The weights are float32 buffers, computed in float64 when the head is fitted: there is nothing to train. `fold`
    gives the same map as an `nn.Linear`.

    Args:
        weight: [K, d].
        bias: [K].
        unit: whether features are scaled to length one first (zero rows stay zero).

    Shapes: features [..., d] -> logits [..., K], dtype of the features.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, unit: bool = False) -> None:
        super().__init__()
        if weight.dim() != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: weight must be [K, d] and bias [K], got {list(weight.shape)} and "
                f"{list(bias.shape)}"
            )
        self.unit = unit
        self.register_buffer("weight", weight.detach().float().contiguous().clone())
        self.register_buffer("bias", bias.detach().float().contiguous().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of features [..., d]."""
        if self.unit:
            x = F.normalize(x.float(), dim=-1).to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def fold(self) -> nn.Linear:
        """The head as one `nn.Linear` with weights of its own.

        Where `unit` is set, it takes features of length one: that division is no linear map, and stays the caller's.
        """
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], device=self.weight.device)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            linear.bias.copy_(self.bias)
        return linear.requires_grad_(False)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"classes={self.weight.shape[0]}, width={self.weight.shape[1]}, unit={self.unit}"


def fit_classes(op: str, features: torch.Tensor, labels: torch.Tensor, classes: int | None) -> ClassMoments:
    """Moments of the classes of a training set, checked.

    Raises:
        ValueError: wrong ranks, no rows, a class without rows (the message names it), NaN or infinity.
    """
    check_rank(op, "features", features, 2, "[N, d]")
    check_float(op, "features", features)
    if features.shape[0] == 0:
        raise ValueError(f"{op}: features must have at least one row, got none")
    moments = average_by_class(features, labels, int(labels.max()) + 1 if classes is None else classes)
    empty = (moments.counts == 0).nonzero()
    if len(empty):
        raise ValueError(f"{op}: class {int(empty[0])} has no rows; give it some, or leave it out of the labels")
    if not bool(moments.means.isfinite().all()):
        row = int((~features.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{op}: features hold NaN or infinity in row {row}")
    return moments
