"""The tables of measured ratios, from the newest rows in results/; `python benchmarks/readme.py` writes them.

docs/measured.md holds every ratio that is asked for, the README of each op and dtype the one that is furthest from what
is asked, or least above it; `planmill bench` and results/ have the others.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEAD = """| op, size | input | on | instead of | ratio | asked | ms | largest error |
|---|---|---|---|---|---|---|---|"""

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


def place(row: Row) -> str:
    """What a row was measured on: the instruction set, or the GPU."""
    return row["versions"]["isa"] if row["device"] == "cpu" else row["versions"]["gpu"]


def amounts(row: Row) -> dict[str, float]:
    """The median in two units."""
    return {"ms": row["p50_ms"], "us": row["p50_ms"] * 1e3}


def time_asked(row: Row) -> str:
    """The time asked for, if one is."""
    limits = [goal["asked"] for goal in row["goals"] if goal["kind"] == "time"]
    return "".join(f" (asked: {limit:g} ms)" if limit >= 0.1 else f" (asked: {limit * 1e3:g} us)" for limit in limits)


def goal_of(row: Row) -> float:
    """The ratio asked for on this machine, or where it is asked only of others, theirs; 0 where none is."""
    goals = [goal for goal in row["goals"] if goal["kind"] == "ratio"]
    judged = [goal["asked"] for goal in goals if goal["met"] is not None]
    return max(judged or [goal["asked"] for goal in goals], default=0.0)


def hardest(rows: list[Row]) -> list[Row]:
    """Of each op and dtype the row with the least of what is asked."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["op"], row["dtype"])
        if key not in found or row["ratio"] / goal_of(row) < found[key]["ratio"] / goal_of(found[key]):
            found[key] = row
    return list(found.values())


def table(rows: list[Row], whole: bool) -> str:
    """Markdown: the machine, the ratios, and the costs that have no ratio worth reading."""
    costs = {(row["op"], row["case"]): row for row in rows if row["op"] in COSTS}
    rows = [row for row in rows if row["op"] not in COSTS and goal_of(row)]
    rows = sorted(rows, key=lambda row: row["op"]) if whole else hardest(rows)
    machines = sorted(
        {
            f"{row['versions']['cpu']} ({place(row)}), {row['versions']['threads']} threads"
            for row in rows
            if row["device"] == "cpu"
        }
    )
    lines = [f"Medians on {'; '.join(machines)}. Peers run in turns with ours in one process.", "", HEAD]
    lines += [
        f"| `{row['op']}`, {row['case']} | {row['dtype']} | {place(row)} | {row['peer']} | {row['ratio']:.2f} "
        f"| {asked(row)} | {row['p50_ms']:.3g} | {row['max_error']:.1e} |"
        for row in rows
    ]
    said = [COSTS[op].format(case=case, **amounts(row), asked=time_asked(row)) for (op, case), row in costs.items()]
    return "\n".join([*lines, "", f"Also measured: {'; '.join(said)}."])


def rendered(text: str, folder: Path, whole: bool) -> str:
    """A page with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(newest(folder), whole)}\n{END}{after}"


PAGES = {ROOT / "README.md": False, ROOT / "docs" / "measured.md": True}  # the page, and whether it holds every ratio

if __name__ == "__main__":
    for page, whole in PAGES.items():
        page.write_text(rendered(page.read_text(), ROOT / "benchmarks" / "results", whole))
