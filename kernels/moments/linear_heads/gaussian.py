"""Heads from Gaussians with one covariance: discriminant analysis and naive Bayes."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from planmill.kernels.moments.class_moments import ClassMoments
from planmill.kernels.moments.linear_heads.base import LinearHead, fit_classes

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def _log_prior(moments: ClassMoments, prior: str) -> torch.Tensor:
    """[K] float64."""
    if prior not in ("uniform", "frequency"):
        raise ValueError(f"prior must be uniform or frequency, got {prior!r}")
    counts = moments.counts.double()
    return (torch.ones_like(counts) / len(counts) if prior == "uniform" else counts / counts.sum()).log()


class GaussianHead(LinearHead):
    """Gaussian discriminant analysis: classes are Gaussians with means mu_c and one covariance S.

    logit_c(x) = x^T P mu_c + log prior_c - mu_c^T P mu_c / 2, with P the precision. As it is published for CLIP the
    precision is P = d ((N - 1) S + tr(S) I)^-1 with S the covariance of the rows about their class means, of divisor
    N - 1: finite for any number of shots. With `zero_shot` the logits of the text classifier are added:
    logit = scale x Wt + alpha (x W + b).

    Make one with `fit`.

    Source: Wang et al., "A hard-to-beat baseline for training-free CLIP-based adaptation" (ICLR 2024), section 3.
    """

    @classmethod
    def fit(
        cls,
        features: torch.Tensor,
        labels: torch.Tensor,
        classes: int | None = None,
        *,
        shrinkage: float | None = None,
        prior: str = "uniform",
    ) -> "GaussianHead":
        """Fit on features [N, d], float32, bfloat16 or float16, and labels [N], int64 or int32.

        Args:
            features: of the training set.
            labels: 0 to K - 1.
            classes: K; the largest label + 1 where it is None.
            shrinkage: None for the published ridge; else s in [0, 1]: S = (1 - s) S_w + s (tr S_w / d) I with S_w of
                divisor N.
            prior: "uniform", as published, or "frequency" of the classes.

        Raises:
            ValueError: see `LinearHead`; a class without rows; a shrinkage outside [0, 1].
            torch.linalg.LinAlgError: the covariance is singular (`shrinkage=0` and too few rows).
        """
        moments = fit_classes("GaussianHead.fit", features, labels, classes)
        scatter, d, n = moments.scatter.double(), features.shape[1], int(moments.counts.sum())
        identity = torch.eye(d, dtype=torch.float64, device=scatter.device)
        if shrinkage is None:
            trace = scatter.trace() / max(n - 1, 1)
            bracket, factor = scatter + (trace if float(trace) > 0 else 1.0) * identity, float(d)
        elif 0 <= shrinkage <= 1:
            s = scatter / n
            bracket, factor = (1 - shrinkage) * s + shrinkage * s.trace() / d * identity, 1.0
        else:
            raise ValueError(f"GaussianHead.fit: shrinkage must be from 0 to 1, got {shrinkage}")
        lower, info = torch.linalg.cholesky_ex(bracket)
        if int(info) != 0 or float(lower.diagonal().min()) <= 1e-7 * float(lower.diagonal().max()):
            raise torch.linalg.LinAlgError(
                f"GaussianHead.fit: the covariance of {n} rows in {d} dimensions is singular; shrink it "
                "(shrinkage=0.1, or None for the published ridge)"
            )
        means = moments.means.double()
        weight = factor * torch.cholesky_solve(means.T, lower).T  # row c is P mu_c
        return cls(weight, _log_prior(moments, prior) - 0.5 * (means * weight).sum(1))

    def with_zero_shot(self, text: torch.Tensor, alpha: float, scale: float = 100.0) -> "GaussianHead":
        """The ensemble with a text classifier [K, d] of unit rows: scale x text^T + alpha (x W^T + b).

        Raises:
            ValueError: `text` of another shape.
        """
        if text.shape != self.weight.shape:
            raise ValueError(
                f"GaussianHead.with_zero_shot: text must be {list(self.weight.shape)}, got {list(text.shape)}"
            )
        own = self.weight.double()
        weight = scale * text.to(own) + alpha * own
        return GaussianHead(weight, alpha * self.bias.double(), unit=self.unit)

    def search_alpha(
        self,
        text: torch.Tensor,
        features: torch.Tensor,
        labels: torch.Tensor,
        *,
        alphas: Sequence[float] = ALPHAS,
        scale: float = 100.0,
    ) -> tuple["GaussianHead", float]:
        """The ensemble whose alpha classifies a validation set [N, d], [N] best, and its alpha; the first of equals."""
        zero_shot, own = scale * F.linear(features.float(), text.float()), self(features.float())
        accuracy = [float(((zero_shot + alpha * own).argmax(1) == labels).double().mean()) for alpha in alphas]
        alpha = alphas[accuracy.index(max(accuracy))]
        return self.with_zero_shot(text, alpha, scale), alpha


class NaiveBayesHead(LinearHead):
    """Gaussian naive Bayes with one diagonal variance v for all classes, which makes it linear.

    log p(c | x) = log prior_c - sum_j (x_j - mu_cj)^2 / (2 v_j) + const; the term x_j^2 / (2 v_j) is the same for every
    class and is left out, so that logit_c(x) = x^T (mu_c / v) + log prior_c - sum_j mu_cj^2 / (2 v_j).

    Make one with `fit`.

    Source: Zheng et al., "Revisiting discriminative vs. generative classifiers: theory and implications" (ICML 2023),
        section 3; the published variance is biased, with 1e-9 added.
    """

    @classmethod
    def fit(
        cls,
        features: torch.Tensor,
        labels: torch.Tensor,
        classes: int | None = None,
        *,
        smoothing: float = 1e-9,
        prior: str = "frequency",
    ) -> "NaiveBayesHead":
        """Fit on features [N, d], float32, bfloat16 or float16, and labels [N], int64 or int32.

        Args:
            features: of the training set.
            labels: 0 to K - 1.
            classes: K; the largest label + 1 where it is None.
            smoothing: this share of the largest variance of a channel is added to all, as scikit-learn does; the
                published constant is meant for features between 0 and 1. Dead channels then have small weights where
                the published form has enormous ones.
            prior: "frequency" of the classes, as published, or "uniform".

        Raises:
            ValueError: see `LinearHead`; a class without rows; all rows of every class equal.
        """
        moments = fit_classes("NaiveBayesHead.fit", features, labels, classes)
        means = moments.means.double()
        within = moments.scatter.double().diagonal() / moments.counts.sum()
        grand = (means * moments.counts[:, None]).sum(0) / moments.counts.sum()
        between = (moments.counts[:, None] * (means - grand) ** 2).sum(0) / moments.counts.sum()
        variance = within + smoothing * float((within + between).max())
        if not bool((variance > 0).all()):
            raise ValueError("NaiveBayesHead.fit: a channel has no variance; give smoothing above 0 or leave it out")
        weight = means / variance
        return cls(weight, _log_prior(moments, prior) - 0.5 * (means * weight).sum(1))
