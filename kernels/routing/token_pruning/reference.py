"""Elimination (EEVG) of one sample and attention scores (FSVG), in float64."""

import math

import torch


def attention_score_reference(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """score[b, i] = mean over heads and queries of softmax_i(scale <q, k_i>); q [B, H, Q, d], k [B, H, L, d]."""
    return (scale * q.double() @ k.double().transpose(-1, -2)).softmax(-1).mean((1, 2))


def smoothed_reference(p: list[float], positions: list[int], grid: tuple[int, int]) -> list[float]:
    """P2: p on the grid, missing cells = min p; 3 x 3 mean in which a neighbour off the grid counts as the centre."""
    h, w = grid
    cells = [min(p)] * (h * w)
    for value, position in zip(p, positions, strict=True):
        cells[position] = value
    smoothed = []
    for position in positions:
        y, x = divmod(position, w)
        total = 0.0
        for v in range(y - 1, y + 2):
            for u in range(x - 1, x + 2):
                total += cells[v * w + u] if 0 <= v < h and 0 <= u < w else cells[position]
        smoothed.append(total / 9)
    return smoothed


def removed_reference(p2: list[float], threshold: float) -> int:
    """R = #{ (P2 - min) / (max - min) < threshold }; 0 where P2 is constant."""
    low, high = min(p2), max(p2)
    return sum((value - low) / (high - low) < threshold for value in p2) if high > low else 0


def kept_reference(scores: list[float], keep: float) -> list[int]:
    """The ceil(keep * N) tokens of highest score, best first, ties to the lower index."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[: math.ceil(keep * len(scores))]
