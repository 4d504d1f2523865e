"""The choice as one Scan over the places to fill; the number of rows need not be known."""

import torch

from planmill.kernels.common.portable import State, scan
from planmill.kernels.neighbors.knn.portable import scale_of


def coreset_portable(features: torch.Tensor, distances: torch.Tensor, count: int, start: int) -> torch.Tensor:
    """See the reference; in float32."""
    f = features.float()
    finite = f.isfinite().all(1)
    f = torch.where(finite[:, None], f, 0)
    known = torch.where(distances.isfinite(), distances, 0)
    scale = scale_of(f, known) if distances.numel() else scale_of(f)
    f = f / scale
    nearest = f.new_full((f.shape[0],), torch.inf)  # min_j |f - c_j|^2
    if distances.numel():
        given = distances / scale
        nearest = given * given
    nearest = torch.where(finite & ~nearest.isnan(), nearest, -1.0)
    far = torch.where(finite, 0.0, torch.inf)  # from everything: a centre that is no number

    def step(state: State, now: State, constants: State) -> tuple[State, State]:
        (nearest, chosen), (rows, far, position) = state, constants  # [1, N] and [1, 1]: TensorRT's argmax asks for two
        centre = chosen[0]
        squared = (rows - rows.index_select(0, centre)).square().sum(1) + far.index_select(0, centre)
        nearest = torch.where(position == chosen, -torch.inf, torch.minimum(nearest, squared))
        return [nearest, nearest.argmax(1, keepdim=True)], [chosen + now[0]]

    first = nearest[None].argmax(1, keepdim=True)
    first = torch.full_like(first, start) if start >= 0 else first
    nothing = torch.zeros(count, 1, 1, dtype=torch.int64, device=f.device)
    constants = [f, far, torch.arange(f.shape[0], device=f.device)]
    _, (chosen,) = scan(step, [nearest[None], first], [nothing], constants)
    return chosen.flatten().int()
