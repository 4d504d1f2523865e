"""matching_pursuit against the published loop (one-hot and dense codes) and a careful loop (product, max, gather).

Error: of random tokens, along the path that was taken, in float64: how far a chosen correlation is from the largest of
its own residual, and how far the residual is from x minus what was taken; relative to the length of the token.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.routing import pursue_matches

from ..cases import Case, Draw, Goal, Peer, plain

TOKENS_CHECKED = 16


def make(tokens: int, atoms: int, width: int, steps: int) -> Callable[[Draw], tuple]:
    """Gaussian tokens and random unit atoms: the correlations are as close together as they get."""
    return lambda draw: (draw.normal(tokens, width), draw.unit(atoms, width), steps)


def one_hot_loop(x: torch.Tensor, dictionary: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As published: one-hot codes, added to dense ones, and multiplied with the dictionary."""
    r, codes = x, torch.zeros(len(x), len(dictionary), dtype=x.dtype, device=x.device)
    for _ in range(steps):
        value, index = (r @ dictionary.T).max(1)
        taken = torch.nn.functional.one_hot(index, len(dictionary)).to(x.dtype) * value[:, None]
        codes, r = codes + taken, r - taken @ dictionary
    return codes, r


def careful_loop(x: torch.Tensor, dictionary: torch.Tensor, steps: int) -> tuple:
    """Product, maximum, gather, subtract."""
    r, values, indices = x.clone(), [], []
    for _ in range(steps):
        value, index = (r @ dictionary.T).max(1)
        r -= value[:, None] * dictionary[index]
        values.append(value)
        indices.append(index)
    return torch.stack(values, 1), torch.stack(indices, 1), r


def check(args: tuple, found: tuple) -> float:
    """Follows the path of random tokens in float64; dense codes (of the published loop) are only added up."""
    x, dictionary, steps = args
    rows = torch.randperm(len(x))[:TOKENS_CHECKED].to(x.device)
    r, atoms = x[rows].double(), dictionary.double()
    scale, worst = r.norm(dim=1), torch.zeros(len(rows), dtype=torch.float64, device=x.device)
    if len(found) == 2:
        r = r - found[0][rows].double() @ atoms
    else:
        for k in range(steps):
            c, chosen = r @ atoms.T, found[1][rows, k].long()
            worst = torch.maximum(worst, c.amax(1) - c.gather(1, chosen[:, None])[:, 0])
            r = r - found[0][rows, k, None].double() * atoms[chosen]
    worst = torch.maximum(worst, (found[-1][rows].double() - r).norm(dim=1))
    return float((worst / scale).max())


CAREFUL, PUBLISHED = "torch.mm + max + gather", "published loop (one-hot)"
PEERS = {CAREFUL: Peer(plain(careful_loop)), PUBLISHED: Peer(plain(one_hot_loop))}
SHARED: dict[str, Any] = {
    "op": "matching_pursuit",
    "ours": pursue_matches,
    "peers": PEERS,
    "check": check,
    "tolerance": {torch.float32: 1e-5},
    "flops": lambda x, dictionary, steps: 2.0 * steps * len(x) * dictionary.numel(),
    "small": make(64, 2048, 256, 4),
}

CASES = [
    Case(id="T1024-D768-M24576-K16", make=make(1024, 24576, 768, 16), goals=(Goal("ratio", 2),), memory=True, **SHARED),
    Case(id="T1024-D768-M4096-K16", make=make(1024, 4096, 768, 16), **SHARED),
    Case(id="T1-D768-M24576-K16", make=make(1, 24576, 768, 16), **SHARED),
]
