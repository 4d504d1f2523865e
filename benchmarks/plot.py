"""Time against size: one line per implementation, both axes logarithmic."""

from pathlib import Path
from typing import Any

Row = dict[str, Any]


def sweeps(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows that belong to a sweep, by op."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["sweep"]:
            found.setdefault(row["op"], []).append(row)
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Write the plot of one op's sweep.

    Args:
        rows: of one op, each with `sweep` = [what grows, how large]; ours is taken from the first row of a size.
        path: .png, .svg or .pdf.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    first = rows[0]
    ours = {row["sweep"][1]: (row["p20_ms"], row["p50_ms"], row["p80_ms"]) for row in reversed(rows)}
    lines = {f"planmill, {first['impl']}": ours}
    for row in rows:
        times = (row["peer_p20_ms"], row["peer_p50_ms"], row["peer_p80_ms"])
        lines.setdefault(row["peer"], {})[row["sweep"][1]] = times
    for place, (name, points) in enumerate(lines.items()):
        x = sorted(points)
        low, middle, high = (list(column) for column in zip(*(points[size] for size in x), strict=True))
        style: dict[str, Any] = {"linewidth": 2.6, "color": "black", "zorder": 3} if place == 0 else {"linewidth": 1.6}
        (line,) = axes.plot(x, middle, marker="o", markersize=4, label=name, **style)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    sizes = sorted(ours)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel(first["sweep"][0])
    axes.set_ylabel("time of a call in ms (line: median, band: p20 to p80)")
    axes.grid(True, which="both", linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False)
    v = first["versions"]
    where = v["gpu"] or f"{v['cpu']}, {v['threads']} threads"
    shared = [part for part in first["case"].split("-")[1:] if all(part in row["case"].split("-") for row in rows)]
    axes.set_title(f"{first['op']}, {first['dtype']}, {' '.join(shared)}\n{where}", fontsize=10)
    figure.savefig(path, dpi=150)


def paths(ops: list[str], chosen: Path | None, folder: Path) -> dict[str, Path]:
    """Where each op's plot goes: the chosen file (with the op's name added when there are several), or the results."""
    if chosen is None:
        return {op: folder / f"{op}-scaling.png" for op in ops}
    if len(ops) == 1:
        return {ops[0]: chosen}
    return {op: chosen.with_stem(f"{chosen.stem}-{op}") for op in ops}
