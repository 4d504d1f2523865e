"""Inputs of bank_score that tests, benchmarks and plan checks share."""

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case
from planmill.kernels.neighbors.mutual_score.cases import ALL


def cases() -> list[Case]:
    return [
        Case(
            "small",
            lambda t, g: (unit(g, t, 2, 6, 8), unit(g, t, 3, 6, 8), 0.0, 0.5, *ALL, True),
            gradient=True,
            compiled=True,
        ),
        Case("one", lambda t, g: (unit(g, t, 1, 1, 1), unit(g, t, 1, 1, 1), 0.0, 0.3, *ALL, True)),
        Case("other_grid", lambda t, g: (unit(g, t, 2, 37, 65), unit(g, t, 5, 22, 65), 0.0, 0.5, *ALL, True)),
        Case("across_tiles", lambda t, g: (unit(g, t, 2, 131, 257), unit(g, t, 4, 131, 257), 0.0, 0.9, *ALL, True)),
        Case("no_images", lambda t, g: (unit(g, t, 0, 6, 8), unit(g, t, 3, 6, 8), 0.0, 0.5, *ALL, True)),
        Case("ties", lambda t, g: (integers(g, t, 3, 40, 6), integers(g, t, 4, 40, 6), 0.0, 0.6, *ALL, True)),
        Case(
            "strided",
            lambda t, g: (strided(unit(g, t, 2, 33, 40)), strided(unit(g, t, 4, 33, 40)), 0.0, 0.5, *ALL, True),
        ),
        Case(
            "large_mean",
            lambda t, g: (
                normal(g, t, 2, 33, 40, mean=1000.0),
                normal(g, t, 4, 33, 40, mean=1000.0),
                0.0,
                0.5,
                *ALL,
                True,
            ),
        ),
        Case(
            "nan",
            lambda t, g: (
                poison_row(unit(g, t, 2, 20, 24), 3),
                poison_row(unit(g, t, 4, 20, 24), 33),
                0.0,
                0.5,
                *ALL,
                True,
            ),
        ),
        Case(
            "radius", lambda t, g: (unit(g, t, 3, 63, 40), unit(g, t, 4, 63, 40), 0.0, 0.5, 1.5, 9, True), gradient=True
        ),
        Case("screened", lambda t, g: (unit(g, t, 2, 99, 128), unit(g, t, 4, 99, 128), 0.0, 0.5, *ALL, False)),
    ]
