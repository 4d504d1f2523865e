"""`planmill bench`: every op against what a user would pick instead, on this machine, in one run."""

import importlib.util
import secrets
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from planmill.errors import PlanmillError

_PACKAGE = "planmill_benchmarks"  # `benchmarks` is too common a name to take


def bench(
    what: Annotated[str | None, typer.Argument(metavar="FAMILY[/OP]", help="E.g. neighbors or neighbors/knn.")] = None,
    goals: Annotated[bool, typer.Option("--goals", help="Only what an issue asks for; asked beside reached.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Only this input dtype: fp32, bf16 or fp16.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every implementation. Default: their own.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    isa: Annotated[str | None, typer.Option(help="Hold our CPU kernels to baseline, avx2, avx512 or amx.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One row per line on standard output, and no table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Where the plot of time against size goes.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small inputs: only to see that it runs.")] = False,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Append the rows to benchmarks/results/.")] = True,
    seed: Annotated[int | None, typer.Option(help="Of the inputs. Default: another one in each run.")] = None,
) -> None:
    """Measure ops against their peers: checked first, alternated in one process, beside the machine's own ceilings."""
    if plot is not None and (plot.suffix not in (".png", ".svg", ".pdf") or not plot.absolute().parent.is_dir()):
        raise PlanmillError(f"{plot}: must be a .png, .svg or .pdf file in a directory that exists")
    benchmarks = load_benchmarks()
    settings = benchmarks.harness.Settings(
        device=_device(device),
        isa=_isa(isa, device),
        threads=threads,
        rounds=3 if quick else 9,
        quick=quick,
        seed=secrets.randbelow(2**31) if seed is None else seed,
    )
    chosen = _choose(benchmarks, what, goals=goals, sweep=bool(plot) or (save and not goals and not quick))
    if plot is not None and not any(case.sweep for case in chosen):
        raise PlanmillError(f"--plot: nothing in {what or 'the benchmarks'} grows with a size on this device")
    kind = _dtype(benchmarks, dtype)
    runs = benchmarks.harness.plan(chosen, settings, kind)
    keep = save and not quick
    rows, missed, failures = _measure(benchmarks, settings, runs, keep=keep, as_json=as_json)
    by_op = benchmarks.plot.sweeps(rows)
    if keep or plot:
        for op, path in benchmarks.plot.paths(list(by_op), plot, benchmarks.harness.RESULTS).items():
            benchmarks.plot.draw(by_op[op], path)
            print(f"plot: {path}", file=sys.stderr)
    missed += benchmarks.harness.left_out(chosen, settings, kind)
    _report(benchmarks, rows, missed, goals=goals, as_json=as_json)
    if failures:
        raise typer.Exit(1)


def load_benchmarks() -> ModuleType:
    """The package `benchmarks/` of the checkout that this installation or the working directory is part of.

    Raises:
        PlanmillError: there is no checkout.
    """
    if _PACKAGE in sys.modules:
        return sys.modules[_PACKAGE]
    import planmill

    roots = [Path(planmill.__file__).parents[1], Path.cwd()]
    for root in roots:
        folder = root / "benchmarks"
        if (folder / "harness.py").is_file() and (root / "planmill" / "_version.py").is_file():
            break
    else:
        raise PlanmillError(
            "bench: the benchmarks are part of Planmill's source checkout, not of the installed package; "
            "run it inside a clone, or install the clone with pip install -e ."
        )
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[_PACKAGE]
        raise
    return package


def _device(device: str) -> str:
    import torch

    if device not in ("cpu", "cuda"):
        raise PlanmillError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise PlanmillError(f"--device cuda: {why}")
    return device


def _isa(isa: str | None, device: str) -> str | None:
    from planmill.kernels import cpu_capabilities

    if isa is None:
        return None
    if device != "cpu":
        raise PlanmillError("--isa is for --device cpu")
    if isa not in cpu_capabilities():
        raise PlanmillError(f"--isa: this machine has {', '.join(cpu_capabilities()) or 'no extension'}, not {isa!r}")
    return isa


def _dtype(benchmarks: Any, name: str | None) -> Any:
    if name is None:
        return None
    if name not in benchmarks.cases.DTYPES:
        raise PlanmillError(f"--dtype must be one of {', '.join(benchmarks.cases.DTYPES)}, got {name!r}")
    return benchmarks.cases.DTYPES[name]


def _choose(benchmarks: Any, what: str | None, *, goals: bool, sweep: bool) -> list[Any]:
    try:
        found = benchmarks.cases.select(what)
    except LookupError as error:
        raise PlanmillError(str(error.args[0])) from error
    return [case for case in found if (sweep if case.sweep else not goals or case.goals)]


def _measure(
    benchmarks: Any, settings: Any, runs: list[Any], *, keep: bool, as_json: bool
) -> tuple[list[dict[str, Any]], list[Any], int]:
    """Run everything: rows, goals not measured, cases that failed their check.

    Rows are printed and saved as they come, so that an interrupted run has lost nothing.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from planmill import kernels

    harness, machine = benchmarks.harness, benchmarks.machine
    rows: list[dict[str, Any]] = []
    failures = 0
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("ceilings", total=sum(harness.steps(run, settings) for run in runs))
        with machine.limited(settings.threads):
            ceilings = machine.ceilings(settings.device, {run.dtype for run in runs}, settings.quick) if runs else {}
        session = harness.Session(settings, ceilings, machine.commit())
        session.note = lambda text: console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)
        session.progress = lambda: bar.advance(task)
        done = 0
        for run in runs:
            bar.update(task, description=escape(f"{run.case.op} {run.case.id} {run.dtype_name}"))
            with kernels.cpu_capability(settings.isa) if settings.isa else nullcontext():
                try:
                    found = harness.execute(run, session)
                except harness.WrongResult as error:
                    failures += 1
                    found = []
                    console.print(f"[bold red]wrong result:[/] {escape(str(error))}", soft_wrap=True)
            done += harness.steps(run, settings)
            bar.update(task, completed=done)
            rows += found
            if as_json:
                print(*(harness.to_json(row) for row in found), sep="\n", end="\n" if found else "", flush=True)
            if keep and found:
                harness.save(found, settings.device)
    return rows, session.missed, failures


def _report(benchmarks: Any, rows: list[dict[str, Any]], missed: list[Any], *, goals: bool, as_json: bool) -> None:
    report = benchmarks.report
    if as_json:
        for case, _, goal, reason in missed:
            print(
                f"not measured: {case.op} {case.id}: {report.asked(goal.kind, goal.value)} ({reason})", file=sys.stderr
            )
        return
    console = report.console()
    if not rows:
        console.print("nothing to run on this device with this dtype")
    else:
        console.print(report.summary(rows), soft_wrap=True)
        if not goals:
            for group in report.cases(rows):
                console.print(report.measurement(group))
    if goals or missed:
        console.print(report.goals(rows if goals else [], missed))
