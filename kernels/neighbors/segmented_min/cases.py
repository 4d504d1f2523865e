"""Inputs of segmented_min that tests, benchmarks and plan checks share: those of segmented_max."""

import torch

from planmill.kernels.common.spec import Case
from planmill.kernels.neighbors.segmented_max import cases as segmented_max


def cases() -> list[Case]:
    return [case for case in segmented_max.cases() if case.id != "across_tiles"]  # the same search walks over its tiles


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Distances close relative to the database's spread; each index reaches its distance, the lowest one on ties."""
    queries, database, offsets = args
    distances, indices = got
    assert distances.dtype == torch.float32
    assert indices.dtype == torch.int32
    found = indices >= 0
    assert torch.equal(found, want[1] >= 0), "another set of segments has a match"
    assert bool((distances[~found] == torch.inf).all())
    if not bool(found.any()):
        return
    rows, columns = torch.arange(len(queries))[:, None].expand_as(indices)[found], indices[found].long()
    segment = torch.arange(indices.shape[1]).expand_as(indices)[found]
    assert bool(((columns >= offsets[segment]) & (columns < offsets[segment + 1])).all())
    scale = float(want[0][found].amax())
    torch.testing.assert_close(distances, want[0], atol=atol * scale, rtol=rtol)
    q, x = queries.double()[rows], database.double()
    reached, best = (q - x[columns]).norm(dim=1), (q - x[want[1][found].long()]).norm(dim=1)
    torch.testing.assert_close(reached, best, atol=atol * scale, rtol=rtol)
    same = reached == best
    assert bool((columns[same] <= want[1][found][same]).all()), "a tie went to a higher index"
