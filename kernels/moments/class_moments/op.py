"""class_moments: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.moments.class_moments.cases import cases, compare
from planmill.kernels.moments.class_moments.reference import class_moments_reference
from planmill.kernels.moments.class_moments.result import ClassMoments


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """With z = x - mean and G the gradient of the scatter: (G + G^T) z, and the gradient of its mean over its count."""
    features, labels, classes = args
    means, _, counts = outputs
    for_means, for_scatter = grads[:2]
    labelled = (labels >= 0) & (labels < classes)
    y = torch.where(labelled, labels, 0).long()
    gradient = torch.zeros_like(features, dtype=torch.float64)
    if for_scatter is not None:
        g = for_scatter.double()
        gradient = (features.double() - means[y].double()) @ (g + g.T)
    if for_means is not None:
        gradient = gradient + (for_means.double() / counts.clamp_min(1)[:, None])[y]
    return torch.where(labelled[:, None], gradient, 0.0).to(features.dtype), None, None


SPEC = OpSpec(
    schema="class_moments(Tensor features, Tensor labels, int classes) -> (Tensor, Tensor, Tensor)",
    outputs=lambda features, labels, classes: [
        ((classes, features.shape[1]), torch.float32),
        ((features.shape[1], features.shape[1]), torch.float32),
        ((classes,), torch.int32),
    ],
    reference=class_moments_reference,
    portable="portable:class_moments_portable",
    cases=cases,
    compare=compare,
    backward=backward,
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (0.0, 2e-6)),
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def average_by_class(features: torch.Tensor, labels: torch.Tensor, classes: int) -> ClassMoments:
    """Counts and means of the classes, and the scatter within them.

    mean_c = (1 / n_c) sum_{y_i = c} x_i; scatter = sum_i (x_i - mean_{y_i})(x_i - mean_{y_i})^T. The pooled covariance
    is scatter / (N - K), or by N or N - 1, as the user's formula wants it. Every row is taken relative to the mean of
    its class, so that distant classes cost no accuracy, as they do with sum x x^T - sum n_c mean_c mean_c^T.

    Args:
        features: [N, d], float32, bfloat16 or float16, any strides.
        labels: [N], int64 or int32, in any order, 0 to K - 1; rows of label -1 are left out.
        classes: K, at least 1.

    Returns:
        A ClassMoments. An empty class has count 0 and mean 0. NaN or infinity in a row goes into the mean of its class
        and into the scatter.

    Raises:
        ValueError: wrong ranks, labels of another length, `classes` below 1; on the CPU also a label outside -1 to
            K - 1 (the message names the row). On a GPU such a row is left out: looking would wait for the device.
        TypeError: other dtypes.

    Source: pooled within-class covariance as in linear discriminant analysis; Hastie, Tibshirani, Friedman, "The
        elements of statistical learning", section 4.3.
    """
    op = "class_moments"
    check_rank(op, "features", features, 2, "[N, d]")
    check_float(op, "features", features)
    check_rank(op, "labels", labels, 1, "[N]")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels must be int64 or int32, got {labels.dtype}")
    if labels.shape[0] != features.shape[0]:
        raise ValueError(f"{op}: labels must be [{features.shape[0]}] like features, got {list(labels.shape)}")
    if labels.device != features.device:
        raise ValueError(f"{op}: labels must be on {features.device} like features, got {labels.device}")
    if classes < 1:
        raise ValueError(f"{op}: classes must be at least 1, got {classes}")
    means, scatter, counts = (_op if is_compiling() else _call)(features, labels, classes)
    return ClassMoments(counts, means, scatter)
