"""Heads from one vector per class: cosine prototypes, von Mises-Fisher, nearest centroid, and fixed sets of vectors."""

import math

import torch
from torch.nn import functional as F

from planmill.kernels.moments.linear_heads.base import LinearHead, fit_classes


class CosineHead(LinearHead):
    """logit_c(x) = temperature cos(x, prototype_c).

    Args:
        prototypes: [K, d]; scaled to length one here.
        temperature: factor of the cosine; 16 or 32 are published with TEEN.

    Source: Wang et al., "Few-shot class-incremental learning via training-free prototype calibration" (NeurIPS 2023),
        section 3; fixed prototypes as in the Equiangular Basis Vectors (CVPR 2023), see `equiangular_vectors`, and the
        d-simplex classifier, see `simplex_vectors`.
    """

    def __init__(self, prototypes: torch.Tensor, temperature: float = 16.0) -> None:
        if prototypes.dim() != 2:
            raise ValueError(f"CosineHead: prototypes must be [K, d], got {list(prototypes.shape)}")
        weight = temperature * F.normalize(prototypes.double(), dim=1)
        super().__init__(weight, weight.new_zeros(len(weight)), unit=True)

    @classmethod
    def fit(
        cls, features: torch.Tensor, labels: torch.Tensor, classes: int | None = None, *, temperature: float = 16.0
    ) -> "CosineHead":
        """Prototypes are the means of the classes of features [N, d] with labels [N].

        Raises:
            ValueError: see `LinearHead`; a class without rows.
        """
        return cls(fit_classes("CosineHead.fit", features, labels, classes).means, temperature)


def calibrate_prototypes(
    prototypes: torch.Tensor, base: torch.Tensor, *, alpha: float = 0.5, temperature: float = 16.0
) -> torch.Tensor:
    """Prototypes of new classes, drawn towards the base classes that they resemble (TEEN).

    With unit rows q of the new and p of the base prototypes: w = softmax_b(temperature q p_b^T) and
    q' = (1 - alpha) q + alpha normalise(sum_b w_b p_b).

    Args:
        prototypes: [K_new, d], means of few shots, any float dtype.
        base: [K_base, d].
        alpha: 0.5 (published for CUB and miniImageNet) or 0.1 (CIFAR-100).
        temperature: of the similarities; 16 as published.

    Returns:
        [K_new, d] float32, not of unit length (the cosine head divides).

    Raises:
        ValueError: no matrices of one width, or no base class.

    Source: Wang et al., "Few-shot class-incremental learning via training-free prototype calibration" (NeurIPS 2023),
        section 4.
    """
    if prototypes.dim() != 2 or base.dim() != 2 or prototypes.shape[1] != base.shape[1] or len(base) == 0:
        raise ValueError(
            "calibrate_prototypes: prototypes must be [K_new, d] and base [K_base, d] with K_base at least 1, got "
            f"{list(prototypes.shape)} and {list(base.shape)}"
        )
    q, p = F.normalize(prototypes.double(), dim=1), F.normalize(base.double(), dim=1)
    delta = F.normalize((temperature * q @ p.T).softmax(1) @ p, dim=1)
    return ((1 - alpha) * q + alpha * delta).float()


class CentroidHead(LinearHead):
    """Nearest centroid: logit_c(x) = x . m_c - |m_c|^2 / 2, largest where |x - m_c| is smallest.

    |x - m_c|^2 = |x|^2 - 2 logit_c(x). CLUE averages such distances over layers, each with its own centroids; their
    square roots are no linear map, so that its verifier is a head for each layer.

    Args:
        centroids: [K, d].
    """

    def __init__(self, centroids: torch.Tensor) -> None:
        if centroids.dim() != 2:
            raise ValueError(f"CentroidHead: centroids must be [K, d], got {list(centroids.shape)}")
        m = centroids.double()
        super().__init__(m, -0.5 * (m * m).sum(1))

    @classmethod
    def fit(cls, features: torch.Tensor, labels: torch.Tensor, classes: int | None = None) -> "CentroidHead":
        """Centroids are the means of the classes of features [N, d] with labels [N].

        Raises:
            ValueError: see `LinearHead`; a class without rows.
        """
        return cls(fit_classes("CentroidHead.fit", features, labels, classes).means)


class VonMisesFisherHead(LinearHead):
    """logit_c(x) = log prior_c + log C_d(kappa_c) + kappa_c m_c . x of unit vectors x: one von Mises-Fisher each.

    log C_d(k) = nu log k - (d / 2) log(2 pi) - log I_nu(k), nu = d / 2 - 1.

    Args:
        directions: [K, d]; scaled to length one here.
        concentrations: [K], above 0.
        log_prior: [K]; uniform where it is None.

    Source: Mardia and Jupp, "Directional statistics" (2000), section 9.3; fit after Sra, "A short note on parameter
        approximation for von Mises-Fisher distributions" (2012). I_nu is taken from its uniform asymptotic expansion
        (DLMF 10.41.3) with three terms, since it leaves the range of float64 where d is large.
    """

    def __init__(
        self, directions: torch.Tensor, concentrations: torch.Tensor, log_prior: torch.Tensor | None = None
    ) -> None:
        if directions.dim() != 2 or concentrations.shape != directions.shape[:1]:
            raise ValueError(
                "VonMisesFisherHead: directions must be [K, d] and concentrations [K], got "
                f"{list(directions.shape)} and {list(concentrations.shape)}"
            )
        if not bool((concentrations > 0).all()):
            raise ValueError("VonMisesFisherHead: concentrations must be above 0")
        kappa, d = concentrations.double(), directions.shape[1]
        prior = kappa.new_full(kappa.shape, -math.log(len(kappa))) if log_prior is None else log_prior.double()
        weight = kappa[:, None] * F.normalize(directions.double(), dim=1)
        super().__init__(weight, prior + log_normaliser(kappa, d), unit=True)

    @classmethod
    def fit(cls, features: torch.Tensor, labels: torch.Tensor, classes: int | None = None) -> "VonMisesFisherHead":
        """Maximum likelihood of the rows of features [N, d], scaled to length one, with labels [N].

        Raises:
            ValueError: see `LinearHead`; a class without rows, or whose rows are all the same direction.
        """
        unit = F.normalize(features.float(), dim=1)
        means = fit_classes("VonMisesFisherHead.fit", unit, labels, classes).means.double()
        resultant, d = means.norm(dim=1), features.shape[1]
        if bool((resultant >= 1 - 1e-7).any()):
            same = int((resultant >= 1 - 1e-7).nonzero()[0])
            raise ValueError(f"VonMisesFisherHead.fit: all rows of class {same} have one direction: kappa is infinite")
        kappa = (resultant * (d - resultant**2) / (1 - resultant**2)).clamp_min(1e-6)
        for _ in range(2):  # Newton; two steps reach 1e-6
            ratio = bessel_ratio(kappa, d)
            kappa = (kappa - (ratio - resultant) / (1 - ratio**2 - (d - 1) / kappa * ratio)).clamp_min(1e-6)
        return cls(means, kappa)


def log_bessel(nu: float, x: torch.Tensor) -> torch.Tensor:
    """log I_nu(x), nu > 0, by the uniform asymptotic expansion; error below 1e-3 / nu^3."""
    z = x / nu
    root = (1 + z * z).sqrt()
    t = 1 / root
    eta = root + (z / (1 + root)).log()
    first = (3 * t - 5 * t**3) / 24
    second = (81 * t**2 - 462 * t**4 + 385 * t**6) / 1152
    third = (30375 * t**3 - 369603 * t**5 + 765765 * t**7 - 425425 * t**9) / 414720
    return nu * eta - 0.5 * (2 * math.pi * nu * root).log() + (first / nu + second / nu**2 + third / nu**3).log1p()


def bessel_ratio(kappa: torch.Tensor, d: int) -> torch.Tensor:
    """I_{d/2}(kappa) / I_{d/2-1}(kappa) by its continued fraction (DLMF 10.33.1), evaluated backwards."""
    ratio = torch.zeros_like(kappa)
    for term in range(int(kappa.max()) + d + 50, 0, -1):
        ratio = 1 / (2 * (d / 2 - 1 + term) / kappa + ratio)
    return ratio


def log_normaliser(kappa: torch.Tensor, d: int) -> torch.Tensor:
    """log C_d(kappa) of the von Mises-Fisher density on the unit sphere of R^d, d >= 2."""
    nu = d / 2 - 1
    if nu <= 8:  # small orders: step down from an order where the expansion is exact to rounding
        steps = 40
        log_i = log_bessel(nu + steps, kappa)
        for step in range(steps, 0, -1):
            log_i = log_i - bessel_ratio(kappa, int(2 * (nu + step))).log()
    else:
        log_i = log_bessel(nu, kappa)
    return nu * kappa.log() - d / 2 * math.log(2 * math.pi) - log_i


def simplex_vectors(classes: int) -> torch.Tensor:
    """The vertices of a regular simplex: unit rows with cosine -1 / (K - 1) to each other.

    Args:
        classes: K, at least 2.

    Returns:
        [K, K - 1] float32.

    Raises:
        ValueError: fewer than two classes.

    Source: Pernici et al., "Regular polytope networks" (2021), section 3: the identity and one constant row, less their
    mean, scaled to length one.
    """
    if classes < 2:
        raise ValueError(f"simplex_vectors: classes must be at least 2, got {classes}")
    n = classes - 1
    rows = torch.cat([torch.eye(n, dtype=torch.float64), torch.full((1, n), (1 - math.sqrt(n + 1)) / n).double()])
    return F.normalize(rows - rows.mean(0), dim=1).float()


def equiangular_vectors(
    classes: int, width: int, *, threshold: float = 0.002, steps: int = 10000, seed: int = 0
) -> tuple[torch.Tensor, float]:
    """Unit rows whose cosines are as near 0 as `width` allows, by gradient descent.

    Minimises sum relu(|V V^T| - I - threshold), rows scaled to length one after each step, until the largest is within
    1e-4 of the threshold or `steps` are done. The published learning rate is 1e-3 with plain gradient descent; here it
    is Adam's, which needs fewer steps; the set is not unique, only its largest cosine matters.

    Args:
        classes: K, at least 1.
        width: d, at least 1.
        threshold: cosines up to it cost nothing.
        steps: the most that are taken.
        seed: of the rows at the start.

    Returns:
        [K, d] float32, and the largest |cosine| of two rows.

    Raises:
        ValueError: fewer than one class or dimension.

    Source: Shen, Sun, Wei, "Equiangular basis vectors" (CVPR 2023), section 3.2.
    """
    if classes < 1 or width < 1:
        raise ValueError(f"equiangular_vectors: classes and width must be at least 1, got {classes} and {width}")
    generator = torch.Generator().manual_seed(seed)
    v = F.normalize(torch.randn(classes, width, generator=generator), dim=1).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=1e-3)
    identity = torch.eye(classes)
    largest = 1.0
    for _ in range(steps):
        off = (v @ v.T).abs() - identity
        largest = float(off.detach().max())
        if largest <= threshold + 1e-4:
            break
        optimizer.zero_grad()
        (off - threshold).relu().sum().backward()
        optimizer.step()
        with torch.no_grad():
            v.copy_(F.normalize(v, dim=1))
    return v.detach(), largest
