"""Few shots of real digits: closed-form heads and retrieval beside scikit-learn's, fitted to the same rows.

python examples/digits/few_shots.py [--seeds 10]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier

from planmill.kernels.moments import GaussianHead, NaiveBayesHead
from planmill.kernels.neighbors import Retriever

SHOTS = (1, 2, 4, 8, 16)
VOTES = 3  # neighbours that vote, each by its cosine
MARGIN = 0.005  # of accuracy, that a head may be behind

Fitted = Callable[[torch.Tensor], torch.Tensor]  # features [M, 64] -> classes [M]


def draw(shots: int, seed: int) -> tuple[torch.Tensor, ...]:
    """`shots` digits of each class from the even rows of scikit-learn's digits, and all odd rows: x, y, x, y."""
    data, target = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32) / 16, torch.tensor(target)
    even, generator = torch.arange(len(y)) % 2 == 0, torch.Generator().manual_seed(seed)
    rows = []
    for c in range(10):
        of_class = (even & (y == c)).nonzero()[:, 0]
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:shots]])
    chosen = torch.cat(rows)
    return x[chosen], y[chosen], x[~even], y[~even]


def fit_head(head: Any) -> Callable[[torch.Tensor, torch.Tensor], Fitted]:
    """Ours."""

    def fit(x: torch.Tensor, y: torch.Tensor) -> Fitted:
        linear = head.fit(x, y).fold()
        return lambda held_out: linear(held_out).argmax(1)

    return fit


def fit_sklearn(make: Callable[[], Any]) -> Callable[[torch.Tensor, torch.Tensor], Fitted]:
    """scikit-learn's."""

    def fit(x: torch.Tensor, y: torch.Tensor) -> Fitted:
        model = make().fit(x.numpy(), y.numpy())
        return lambda held_out: torch.from_numpy(model.predict(held_out.numpy()))

    return fit


def fit_retriever(x: torch.Tensor, y: torch.Tensor) -> Fitted:
    """Ours: the rows themselves, by cosine."""
    return Retriever(x, y, k=VOTES, weights="similarity").classify


PAIRS = {
    "Gaussian discriminant": (
        fit_head(GaussianHead),
        fit_sklearn(lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")),
    ),
    "naive Bayes": (fit_head(NaiveBayesHead), fit_sklearn(GaussianNB)),
    "retrieval": (
        fit_retriever,
        fit_sklearn(lambda: KNeighborsClassifier(VOTES, metric="cosine", weights=lambda distances: 1 - distances)),
    ),
}


def measure(fit: Callable[[torch.Tensor, torch.Tensor], Fitted], shots: int, seeds: int) -> tuple[float, float, float]:
    """Mean accuracy, median milliseconds of fitting and of classifying the held-out digits."""
    accuracy, fitting, classifying = [], [], []
    for seed in range(seeds):
        x, y, held_x, held_y = draw(shots, seed)
        started = time.perf_counter()
        predict = fit(x, y)
        fitted = time.perf_counter()
        found = predict(held_x)
        classifying.append(1000 * (time.perf_counter() - fitted))
        fitting.append(1000 * (fitted - started))
        accuracy.append(float((found == held_y).double().mean()))
    return statistics.fmean(accuracy), statistics.median(fitting), statistics.median(classifying)


def main() -> int:
    """Print the table; returns 1 where a head is more than half a point behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="draws that are averaged")
    seeds = parser.parse_args().seeds
    table = Table("head", "shots", "accuracy", "fit, ms", "classify 898, ms", title=f"Digits, mean of {seeds} draws")
    table.caption = "ours / scikit-learn"
    behind = 0
    for name, (ours, theirs) in PAIRS.items():
        measure(ours, 16, 1)  # warm up
        measure(theirs, 16, 1)
        for shots in SHOTS:
            own, cells = measure(ours, shots, seeds), (["-"] * 3)
            if shots > 1 or name != "Gaussian discriminant":  # one shot has no covariance that LDA could shrink
                other = measure(theirs, shots, seeds)
                cells = [f"{other[0]:.1%}", f"{other[1]:.1f}", f"{other[2]:.1f}"]
                behind += own[0] < other[0] - MARGIN
            shown = (f"{own[0]:.1%}", f"{own[1]:.1f}", f"{own[2]:.1f}")
            table.add_row(name, str(shots), *(f"{a} / {b}" for a, b in zip(shown, cells, strict=True)))
        table.add_section()
    console = Console(highlight=False)
    console.print(table)
    console.print("[red]behind scikit-learn by more than half a point[/]" if behind else "[green]as expected[/]")
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main())
