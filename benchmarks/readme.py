"""The README's table of measured ratios, from the newest rows in results/; `python benchmarks/readme.py` writes it.

It holds the ratios that an issue asks for; `planmill bench` and results/ have the others.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEAD = """| op, size | input | instead of | ratio | asked | ms | largest error |
|---|---|---|---|---|---|---|"""

COSTS = {
    "call_overhead": "a call of `{case}` at 8 elements {us:.1f} us{asked}",
    "import_time": "`import {case}` {ms:.1f} ms beyond torch{asked}",
}

Row = dict[str, Any]


def newest(folder: Path) -> list[Row]:
    """The last row of each (machine, op, case, dtype, backend, peer) that is neither quick nor part of a sweep."""
    rows: dict[tuple, Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if not row["sweep"] and not row["quick"] and row["ratio"] is not None:
                rows[path.stem, row["op"], row["case"], row["dtype"], row["impl"], row["peer"]] = row
    return list(rows.values())


def asked(row: Row) -> str:
    """The ratio asked for, or why it is not asked on this machine."""
    goals = [goal for goal in row["goals"] if goal["kind"] == "ratio"]
    return ", ".join(f"{goal['asked']:g}x" + (f" ({goal['reason']})" if goal["met"] is None else "") for goal in goals)


def amounts(row: Row) -> dict[str, float]:
    """The median in two units."""
    return {"ms": row["p50_ms"], "us": row["p50_ms"] * 1e3}


def time_asked(row: Row) -> str:
    """The time asked for, if one is."""
    limits = [goal["asked"] for goal in row["goals"] if goal["kind"] == "time"]
    return "".join(f" (asked: {limit:g} ms)" if limit >= 0.1 else f" (asked: {limit * 1e3:g} us)" for limit in limits)


def table(rows: list[Row]) -> str:
    """Markdown: the machine, the ratios, and the costs that have no ratio worth reading."""
    costs = {(row["op"], row["case"]): row for row in rows if row["op"] in COSTS}
    rows = [row for row in rows if row["op"] not in COSTS and any(goal["kind"] == "ratio" for goal in row["goals"])]
    machines = sorted(
        {
            f"{row['versions']['cpu']}, {row['versions']['threads']} threads, {row['impl']}"
            for row in rows
            if "C++" in row["impl"]
        }
    )
    lines = [f"Medians on {'; '.join(machines)}. Peers run in turns with ours in one process.", "", HEAD]
    lines += [
        f"| `{row['op']}`, {row['case']} | {row['dtype']} | {row['peer']} | {row['ratio']:.2f} | {asked(row)} "
        f"| {row['p50_ms']:.3g} | {row['max_error']:.1e} |"
        for row in rows
    ]
    said = [COSTS[op].format(case=case, **amounts(row), asked=time_asked(row)) for (op, case), row in costs.items()]
    return "\n".join([*lines, "", f"Also measured: {'; '.join(said)}."])


def rendered(text: str, folder: Path) -> str:
    """The README with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(newest(folder))}\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(), ROOT / "benchmarks" / "results"))
