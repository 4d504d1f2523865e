"""The command line: `planmill build | run | serve | inspect | bench | doctor | ...`. One module per command."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from planmill._version import __version__
from planmill.errors import PlanmillError

app = typer.Typer(
    name="planmill",
    help="Mill PyTorch models into inference plans, and measure the kernels inside them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"planmill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Mill PyTorch models into inference plans, and measure the kernels inside them."""


def _register() -> None:
    """Each command module stays light: it imports torch and the rest inside its function."""
    from planmill.cli import bench, build, doctor, export_server, info, inspect, ops, run, serve

    app.command("build")(build.build)
    app.command("run")(run.run)
    app.command("info")(info.info)
    app.command("serve")(serve.serve)
    app.command("export-server")(export_server.export_server)
    app.command("inspect")(inspect.inspect)
    app.command("bench")(bench.bench)
    app.command("doctor")(doctor.doctor)
    app.command("ops")(ops.ops)


_register()


def main() -> None:
    """Entry point: a PlanmillError becomes one line on standard error and exit code 2."""
    try:
        app()
    except PlanmillError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
