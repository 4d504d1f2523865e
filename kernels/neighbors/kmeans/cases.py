"""Inputs of kmeans that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import integers, normal, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)


def _blobs(g: torch.Generator, rows: int, width: int, clusters: int, mean: float = 0.0) -> tuple:
    """Rows around centres far apart, and one row of each as its start: rounding decides nothing."""
    centers = normal(g, torch.float32, clusters, width, scale=8.0, mean=mean)
    x = centers.repeat(-(-rows // clusters), 1)[:rows] + normal(g, torch.float32, rows, width)
    return x, x[:clusters].clone()


def _empty(g: torch.Generator) -> tuple:
    x, start = _blobs(g, 90, 6, 5)
    start[2:4] += 1000.0
    return x, start


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: (*_blobs(g, 11, 4, 3), 5, 0.0, True), FLOAT32, compiled=True),
        Case("one", lambda t, g: (*_blobs(g, 1, 1, 1), 3, 0.0, False), FLOAT32),
        Case("every_row", lambda t, g: (*_blobs(g, 30, 5, 30), 3, 0.0, True), FLOAT32),
        Case("across_tiles", lambda t, g: (*_blobs(g, 1025, 65, 131), 4, 0.0, True), FLOAT32),
        Case("no_structure", lambda t, g: (normal(g, t, 300, 9), normal(g, t, 20, 9), 3, 0.0, True), FLOAT32),
        Case("ties", lambda t, g: (integers(g, t, 90, 3), integers(g, t, 8, 3), 1, 0.0, False), FLOAT32),
        Case("strided", lambda t, g: (*(strided(z) for z in _blobs(g, 90, 40, 7)), 3, 0.0, False), FLOAT32),
        Case("large_mean", lambda t, g: (*_blobs(g, 90, 10, 5, mean=1000.0), 4, 1e-3, True), FLOAT32),
        Case("relocated", lambda t, g: (*_empty(g), 6, 0.0, True), FLOAT32),
        Case("kept", lambda t, g: (*_empty(g), 6, 0.0, False), FLOAT32),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """The same rounds to the same centres; labels and distances are those of the centres that came out."""
    features, x = args[0], args[0].double()
    centers, distances, labels, rounds = got
    assert torch.equal(rounds, want[3]), "another number of rounds"
    size = float(features.abs().max())
    torch.testing.assert_close(centers, want[0], atol=atol * size, rtol=rtol)
    true = torch.cdist(x, centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
    reached = true.gather(1, labels[:, None].long())[:, 0]
    torch.testing.assert_close(distances.double(), reached, atol=atol * size, rtol=rtol)
    nearest = true.min(1).values
    assert bool((reached <= nearest * (1 + rtol)).all()), "a label is not that of the nearest centre"
    tied = (true == nearest[:, None]).int().argmax(1)
    assert bool((labels <= tied)[reached == nearest].all()), "a tie did not go to the lower index"
