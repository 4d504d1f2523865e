"""The tables of a run: every row, and what was asked beside what was reached."""

import math
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import Case, Goal

Row = dict[str, Any]
_WIDTH = 150  # of tables that go into a file or a pipe, where nobody says how wide the paper is


def console() -> Console:
    """Standard output; wide where it is not a terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_WIDTH)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent between 0.001 and 999999; "-" for None."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def size(value: float | None) -> str:
    """Bytes as MiB."""
    return "-" if value is None else f"{number(value / 2**20)} MiB"


def amount(kind: str, value: float | None) -> str:
    """What a goal of this kind asks for or reached, with its unit."""
    if value is None:
        return "-"
    if kind == "ratio":
        return f"{number(value)}x"
    if kind == "memory":
        return size(value)
    if kind == "time":
        return f"{number(value)} ms" if value >= 0.1 else f"{number(value * 1e3)} us"
    if kind in ("gemm", "copy"):
        return f"{100 * value:.0f} % of {'GEMM' if kind == 'gemm' else 'a copy'}"
    return f"{value:.2g}"


def asked(kind: str, value: float) -> str:
    """A goal as words: "at least 4.00x"."""
    bound = "at most" if kind in ("error", "memory", "time") else "at least"
    return f"{bound} {amount(kind, value)}"


def mark(met: bool | None, reason: str) -> str:
    """Reached, missed, or why it is not asked here."""
    if met is None:
        return f"[yellow]{escape(f'({reason})')}[/]"
    return "[green]✓ reached[/]" if met else "[red]✗ missed[/]"


def ratio_goals(row: Row) -> str:
    """The ratios asked for beside this peer; every condition that does not hold here is named."""
    return "\n".join(
        f"{amount('ratio', goal['asked'])} {mark(goal['met'], goal['reason'])}"
        for goal in row["goals"]
        if goal["kind"] == "ratio"
    )


def cases(rows: list[Row]) -> list[list[Row]]:
    """The rows of each case, dtype and backend together: they share what ours measured."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["case"], row["dtype"], row["impl"]), []).append(row)
    return list(found.values())


def measurement(rows: list[Row]) -> Table:
    """One case: ours, then a line per peer."""
    row = rows[0]
    title = f"{row['op']}  {row['case']}  {row['dtype']}" + ("  (quick sizes)" if row["quick"] else "")
    table = Table("ran", title=escape(title), title_justify="left", title_style="bold")
    for name in ("ms", "p20 to p80", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("asked")
    gemm, copy = (number((row[name] or 0) / 1e9) for name in ("gemm_flops_per_s", "copy_bytes_per_s"))
    for name in (f"GFLOP/s\n(GEMM {gemm})", f"GB/s\n(copy {copy})", "max error", "extra memory"):
        table.add_column(name, justify="right", no_wrap=True)
    times = (row["p20_ms"], row["p50_ms"], row["p80_ms"])
    flops, moved = ((row[name] or 0) * row["p50_ms"] for name in ("flops_per_s", "bytes_per_s"))
    ours = f"[bold]{escape(row['impl'])}[/]"
    table.add_row(*_line(ours, times, "", "", flops, moved, row["max_error"], row["extra_bytes"]), end_section=True)
    for row in rows:
        times = (row["peer_p20_ms"], row["peer_p50_ms"], row["peer_p80_ms"])
        ratio, error, memory = f"{number(row['ratio'])}x", row["peer_max_error"], row["peer_extra_bytes"]
        table.add_row(*_line(escape(row["peer"]), times, ratio, ratio_goals(row), flops, moved, error, memory))
    return table


def _line(
    name: str,
    times: tuple[float, float, float],
    ratio: str,
    goal: str,
    flops: float,
    moved: float,
    error: float | None,
    memory: int | None,
) -> tuple[str, ...]:
    low, middle, high = times
    rates = (number(work / middle / 1e9) if work else "-" for work in (flops, moved))
    wrong = "-" if error is None else f"{error:.1e}"
    return name, number(middle), f"{number(low)} to {number(high)}", ratio, goal, *rates, wrong, size(memory)


def goals(rows: list[Row], missed: list[tuple[Case, torch.dtype, Goal, str]]) -> Table:
    """Asked beside reached, one line per goal; goals that were not measured come last."""
    table = Table("op", "case", "dtype", "ran", "asked", "reached", "", title="asked beside reached")
    seen: set[tuple] = set()
    for row in rows:
        for goal in row["goals"]:
            peer = row["peer"] if goal["kind"] == "ratio" else None
            key = (row["op"], row["case"], row["dtype"], row["impl"], goal["kind"], goal["asked"], peer)
            if key in seen:
                continue
            seen.add(key)
            text = asked(goal["kind"], goal["asked"]) + (f" beside {peer}" if peer else f" ({_KINDS[goal['kind']]})")
            cells = (*key[:4], text, amount(goal["kind"], goal["reached"]))
            table.add_row(*(escape(str(cell)) for cell in cells), mark(goal["met"], goal["reason"]))
    for case, dtype, goal, reason in missed:
        text = asked(goal.kind, goal.value) + (f" beside {goal.peer}" if goal.peer else f" ({_KINDS[goal.kind]})")
        name = str(dtype).removeprefix("torch.")
        table.add_row(case.op, escape(case.id), name, "-", escape(text), "-", mark(None, reason))
    return table


_KINDS = {
    "ratio": "each peer",
    "error": "largest error",
    "memory": "extra memory",
    "time": "time of a call",
    "gemm": "FLOP/s",
    "copy": "bytes/s",
}


def summary(rows: list[Row]) -> str:
    """The machine and the ceilings, in one line."""
    row = rows[0]
    v = row["versions"]
    where = v["gpu"] or f"{v['cpu']}, {v['isa']}"
    gemm = {r["dtype"]: r["gemm_flops_per_s"] for r in rows if r["gemm_flops_per_s"]}
    ceilings = ", ".join(f"GEMM {number(value / 1e9)} GFLOP/s beside {dtype} rows" for dtype, value in gemm.items())
    copy = f"copy {number(row['copy_bytes_per_s'] / 1e9)} GB/s" if row["copy_bytes_per_s"] else ""
    return f"{where}, {v['threads']} threads, torch {v['torch']}, commit {row['commit']}; {ceilings}; {copy}"
