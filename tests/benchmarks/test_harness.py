"""The harness: what it refuses, what it computes, what it writes. Nothing here judges a time."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import planmill
from planmill import cli, kernels
from planmill.cli.bench import load_benchmarks

bench: Any = load_benchmarks()
Case, Goal, Peer, Run = bench.cases.Case, bench.cases.Goal, bench.cases.Peer, bench.harness.Run

DESIGNED = [
    "op",
    "case",
    "dtype",
    "device",
    "impl",
    "peer",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "peer_p50_ms",
    "ratio",
    "goal",
    "max_error",
    "extra_bytes",
    "flops_per_s",
    "bytes_per_s",
    "gemm_flops_per_s",
    "copy_bytes_per_s",
    "commit",
    "versions",
]


def doubling(peer: Callable[[torch.Tensor], Any], **changes: Any) -> Any:
    """A case whose ours doubles 64 numbers."""
    return Case(
        **{
            "op": "doubling",
            "id": "64",
            "make": lambda draw: (draw.normal(64),),
            "ours": lambda x: x + x,
            "peers": {"it": Peer(bench.cases.plain(peer))},
            "check": lambda args, y: float((y - 2 * args[0]).abs().max()),
            "tolerance": {torch.float32: 1e-6},
            "flops": lambda x: 64.0,
            **changes,
        }
    )


def session(**settings: Any) -> Any:
    """A session with made-up ceilings and few rounds."""
    chosen = bench.harness.Settings(**{"rounds": 3, "budget_s": 0.0, **settings})
    return bench.harness.Session(chosen, {"float32": 1e11, "copy": 1e10}, "abc1234", note=lambda text: None)


def rows_of(case: Any, **settings: Any) -> list[dict[str, Any]]:
    return bench.harness.execute(Run(case, torch.float32, bench.harness.level()), session(**settings))


def timed(ours_ms: float, peer_ms: float, **changes: Any) -> Any:
    """A case whose calls say themselves how long they took."""
    peers = {"it": Peer(lambda: lambda: peer_ms, yardstick=True)}
    changes = {"make": lambda draw: (), "peers": peers, "check": None, "flops": lambda: 6e6,
               "bytes": lambda: 5e6, **changes}  # fmt: skip
    return doubling(abs, ours=lambda: ours_ms, reports_ms=True, **changes)


@pytest.mark.parametrize(
    ("case", "who"),
    [
        (doubling(lambda x: 2 * x + 1e-3), "it"),
        (doubling(lambda x: x * torch.nan), "it"),
        (doubling(lambda x: 2 * x, ours=lambda x: 3 * x), "ours"),
    ],
    ids=["wrong-peer", "nan-peer", "wrong-ours"],
)
def test_what_computes_something_else_is_not_timed(case: Any, who: str) -> None:
    with pytest.raises(bench.harness.WrongResult, match=f"doubling 64 float32, {who}: error .* not timed"):
        rows_of(case)


def test_every_row_has_every_field() -> None:
    (row,) = rows_of(doubling(lambda x: 2 * x))
    assert tuple(row) == bench.harness.FIELDS
    assert list(row)[: len(DESIGNED)] == DESIGNED
    assert {"planmill", "torch", "numpy", "faiss", "scikit-learn", "triton", "python"} <= set(row["versions"])
    assert {"cpu", "isa", "threads", "gpu", "driver"} <= set(row["versions"])
    assert (row["impl"], row["commit"], row["peer"], row["max_error"]) == ("planmill", "abc1234", "it", 0.0)
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert row["bytes_per_s"] == pytest.approx(2 * 64 * 4 / row["p50_ms"] * 1e3)
    row = rows_of(doubling(lambda x: 2 * x, bytes=lambda x: 7.0 * len(x)))[0]
    assert row["bytes_per_s"] == pytest.approx(7 * 64 / row["p50_ms"] * 1e3)
    assert json.loads(bench.harness.to_json(row)) == row


def test_ratio_rates_and_quantiles() -> None:
    (row,) = rows_of(timed(2.0, 6.0))
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"], row["peer_p50_ms"]) == (2.0, 2.0, 2.0, 6.0)
    assert row["ratio"] == 3.0
    assert row["flops_per_s"] == pytest.approx(3e9)
    quantiles = bench.timing.Quantiles.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (quantiles.p20, quantiles.p50, quantiles.p80) == (2.0, 3.5, 5.0)


@pytest.mark.parametrize(
    ("goal", "reached", "met"),
    [
        (Goal("ratio", 3.0), 3.0, True),
        (Goal("ratio", 3.1, "it"), 3.0, False),
        (Goal("time", 2.5), 2.0, True),
        (Goal("time", 1.9), 2.0, False),
        (Goal("gemm", 0.03), 0.03, True),
        (Goal("gemm", 0.04), 0.03, False),
        (Goal("copy", 0.2), 0.25, True),
        (Goal("copy", 0.3), 0.25, False),
        (Goal("memory", 1.0), None, None),
    ],
    ids=lambda value: f"{value.kind}-{value.value}" if hasattr(value, "kind") else "",
)
def test_goals_are_judged(goal: Any, reached: float | None, met: bool | None) -> None:
    (row,) = rows_of(timed(2.0, 6.0, goals=(goal,)))
    (judged,) = row["goals"]
    assert judged["reached"] == (None if reached is None else pytest.approx(reached))
    assert judged["met"] is met
    assert row["goal"] == (goal.value if goal.kind == "ratio" else None)


def test_a_goal_speaks_of_its_peer_and_dtype() -> None:
    case = timed(2.0, 6.0, goals=(Goal("ratio", 3.0, "another"), Goal("time", 1.0, dtype=torch.bfloat16)))
    (row,) = rows_of(case)
    assert row["goals"] == []


@pytest.mark.parametrize(
    ("needs", "isa", "machine", "reason"),
    [
        ("", "avx2", ("baseline", "avx2"), ""),
        ("amx", "amx", ("baseline", "avx2", "avx512", "amx"), ""),
        ("amx", "avx512", ("baseline", "avx2", "avx512", "amx"), "needs AMX: held to avx512"),
        ("amx", "avx2", ("baseline", "avx2"), "needs AMX: not on this machine"),
        ("no amx", "avx2", ("baseline", "avx2"), ""),
        ("no amx", "amx", ("baseline", "avx2", "avx512", "amx"), "asked with AMX switched off: --isa avx512"),
    ],
)
def test_a_goal_names_the_condition_that_does_not_hold(
    needs: Any, isa: str, machine: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "cpu_capabilities", lambda: machine)
    goal = Goal("ratio", 3.0, needs=needs)
    assert bench.harness.unmet(goal, "cpu", isa) == reason
    settings = bench.harness.Settings()
    judged = bench.harness.judge(goal, {"ratio": 9.0}, Run(timed(1, 9), torch.float32, isa), settings)
    assert judged["reason"] == reason
    assert judged["met"] is (None if reason else True)
    assert bench.harness.unmet(goal, "cuda", isa) == "asked of cpu"
    assert reason == "" or reason in bench.report.mark(judged["met"], judged["reason"])


def test_a_goal_without_amx_gets_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.harness, "level", lambda: "amx")
    case = timed(1.0, 2.0, goals=(Goal("ratio", 3, needs="amx"), Goal("ratio", 1.2, needs="no amx")))
    settings = bench.harness.Settings()
    assert [run.isa for run in bench.harness.plan([case], settings)] == ["amx", "avx512"]
    assert [run.isa for run in bench.harness.plan([case], replace(settings, isa="avx2"))] == ["avx2"]
    assert bench.harness.plan([replace(case, devices=("cuda",))], settings) == []


def test_goals_of_another_device_are_kept_with_a_reason() -> None:
    case = timed(1.0, 2.0, goals=(Goal("gemm", 0.6, device="cuda"),), devices=("cuda",))
    ((_, _, goal, reason),) = bench.harness.left_out([case], bench.harness.Settings())
    assert (goal.value, reason.partition(":")[0]) == (0.6, "needs CUDA" if not torch.cuda.is_available() else reason)


def test_a_peer_that_is_not_installed_is_noted() -> None:
    notes: list[str] = []
    case = doubling(lambda x: 2 * x, goals=(Goal("ratio", 2.0, "absent"),))
    peers = {**case.peers, "absent": Peer(bench.cases.plain(abs), package="no_such_package_here")}
    shared = session()
    shared.note = notes.append
    run = Run(replace(case, peers=peers), torch.float32, bench.harness.level())
    assert [row["peer"] for row in bench.harness.execute(run, shared)] == ["it"]
    assert [(goal.value, reason) for _, _, goal, reason in shared.missed] == [
        (2.0, "no_such_package_here is not installed")
    ]
    assert notes == ["doubling: no peer absent: no_such_package_here is not installed (pip install 'planmill[bench]')"]


def test_a_case_whose_package_is_not_installed_is_noted() -> None:
    notes: list[str] = []
    shared = session()
    shared.note = notes.append
    case = doubling(lambda x: 2 * x, goals=(Goal("ratio", 2.0),), package="no_such_package_here")
    assert bench.harness.execute(Run(case, torch.float32, bench.harness.level()), shared) == []
    assert [reason for *_, reason in shared.missed] == ["no_such_package_here is not installed"]
    assert notes == ["doubling: no case 64: no_such_package_here is not installed (pip install 'planmill[models]')"]


def test_a_family_needs_only_its_own_files() -> None:
    program = (
        "import sys; from planmill.cli.bench import load_benchmarks; cases = load_benchmarks().cases.select('moments');"
        "assert 'moments/mahalanobis' in {case.file for case in cases}; assert 'planmill.engine' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rounds_alternate_and_start_with_another_each_time() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 1.0  # type: ignore[func-returns-value]

    samples = bench.timing.alternate(
        {name: call(name) for name in "abc"}, bench.timing.Sampler(reports_ms=True), rounds=30, budget_s=0.0
    )
    text = "".join(order)
    turns = [text[i : i + 3] for i in range(6, len(text), 3)]
    assert text[:6] == "aabbcc"
    assert [turn[0] for turn in turns] == list("abc" * 10)
    assert {*turns} == {"abc", "acb", "bac", "bca", "cab", "cba"}  # none always follows the same other one
    assert {name: len(values) for name, values in samples.items()} == {"a": 30, "b": 30, "c": 30}


def test_short_calls_run_before_the_clock_starts() -> None:
    calls: list[float] = []
    bench.timing.Sampler(calls=8)(lambda: calls.append(time.perf_counter()))
    assert len(calls) == 8 + 2
    calls.clear()
    bench.timing.Sampler()(lambda: calls.append(time.perf_counter()))
    assert len(calls) == 1


def test_rows_are_appended(tmp_path: Path) -> None:
    rows = rows_of(timed(2.0, 6.0))
    path = bench.harness.save(rows, "cpu", tmp_path)
    before = path.read_text()
    assert bench.harness.save(rows, "cpu", tmp_path) == path
    assert path.read_text() == before + before
    assert path.name == f"cpu-{(kernels.cpu_capabilities() or ('reference',))[-1]}.jsonl"


MEMORY_PROGRAM = """
import torch
from planmill.cli.bench import load_benchmarks
measure = load_benchmarks().memory.extra_bytes
def scratch(mib, output=1):
    def call():
        result = torch.ones(output << 18)
        for _ in range(3):  # freed before it is taken again: the peak counts once
            x = torch.ones(mib << 18)
            del x
        return result
    return call
print(*(measure(scratch(mib, output), scratch(1)) / 2**20 for mib, output in ((64, 1), (64, 64), (2, 1))))
"""


def test_memory_sees_a_known_allocation() -> None:
    """64 MiB of working memory is seen whatever the output; the output itself counts for nothing."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = ["/usr/bin/env", *(f"{k}={v}" for k, v in environment.items()), sys.executable, "-c", MEMORY_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plain, beside_output, small = (float(value) for value in done.stdout.split())
    assert plain == pytest.approx(64, rel=0.1)
    assert beside_output == pytest.approx(64, rel=0.1)
    assert small == pytest.approx(2, abs=1)


def test_a_memory_child_that_fails_says_why() -> None:
    spec = {"file": "neighbors/segmented_max", "op": "segmented_max", "case": "none", "dtype": "float32"}
    with pytest.raises(bench.memory.MemoryUnknown, match="memory of segmented_max none ours: StopIteration"):
        bench.memory.measure(spec | {"device": "cpu", "peer": "", "threads": None, "isa": None, "seed": 0})


def test_a_plot_of_time_against_size(tmp_path: Path) -> None:
    rows = []
    for size in (2, 4, 8):
        case = timed(size * 1.0, size * 3.0, sweep=("images", size), id=f"scaling-N{size}-P196")
        rows += rows_of(case)
    by_op = bench.plot.sweeps([*rows, *rows_of(timed(1.0, 2.0))])
    assert [row["sweep"][1] for row in by_op["doubling"]] == [2, 4, 8]
    path = bench.plot.paths(["doubling"], tmp_path / "times.png", tmp_path)["doubling"]
    bench.plot.draw(by_op["doubling"], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert bench.plot.paths(["a", "b"], Path("x.png"), tmp_path) == {"a": Path("x-a.png"), "b": Path("x-b.png")}
    assert bench.plot.paths(["a"], None, tmp_path) == {"a": tmp_path / "a-scaling.png"}


def test_every_case_is_well_formed() -> None:
    cases = bench.cases.select(None)
    assert len({(case.op, case.id) for case in cases}) == len(cases)
    for case in cases:
        assert set(case.dtypes) <= set(case.tolerance) or case.check is None, case.id
        assert {goal.peer for goal in case.goals} <= {None, *case.peers}, case.id
        assert case.peers, case.id
    measured = {case.op for case in cases}
    kernels_of_neighbors = {spec.name for spec in kernels.ops().values() if spec.family == "neighbors" and spec.cpu}
    assert kernels_of_neighbors <= measured, "an op with a kernel of its own has no benchmark"


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["planmill", "bench", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_json_is_one_row_per_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, "neighbors/segmented_max", "--quick", "--json", "--seed", "7", "--threads", "1") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [tuple(row) for row in rows] == [bench.harness.FIELDS]
    assert rows[0]["impl"] == kernels.which("segmented_max").backend
    assert (rows[0]["seed"], rows[0]["quick"], rows[0]["versions"]["threads"]) == (7, True, 1)
    assert rows[0]["gemm_flops_per_s"] > 0
    assert rows[0]["copy_bytes_per_s"] > 0
    assert 0 <= rows[0]["max_error"] <= 1e-5


def test_goals_are_printed_asked_beside_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "neighbors/mutual_score", "--goals", "--quick", "--dtype", "bf16") == 0
    text = capsys.readouterr().out
    assert "asked beside reached" in text
    assert "at least 12.0x" in text
    assert "at least 60 % of GEMM" in text
    assert "not at quick sizes" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["family"], "no benchmark family 'family'; there are ... neighbors, ... package"),
        (["neighbors/none"], "no benchmark 'neighbors/none'; there are ... neighbors/bank_score,"),
        (["--dtype", "int8"], "--dtype must be one of fp32"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--isa", "sse"], "--isa: this machine has"),
        (["--plot", "no/such/folder/x.png"], "in a directory that exists"),
        (["neighbors/bank_score", "--plot", "x.png"], "--plot: nothing in neighbors/bank_score grows with a size"),
    ],
    ids=["family", "op", "dtype", "device", "isa", "plot", "plot-without-sweep"],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    for part in message.split("..."):
        assert part.strip() in lines[0]


def test_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planmill, "__file__", str(tmp_path / "site-packages" / "planmill" / "__init__.py"))
    monkeypatch.delitem(sys.modules, "planmill_benchmarks")
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "neighbors") == 2
    assert "run it inside a clone, or install the clone with pip install -e ." in capsys.readouterr().err
