"""`planmill ops`: every op with its schema."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def ops(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the ops, their schemas and which kernels they have."""
    from planmill import kernels

    rows = [
        {"op": spec.name, "family": spec.family, "schema": spec.schema, "cpu": spec.cpu, "cuda": spec.cuda}
        for spec in kernels.ops().values()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("op", "family", "CPU", "GPU", "schema")
    for row in rows:
        cpu, cuda = row["cpu"] or "reference", row["cuda"] or "reference"
        table.add_row(row["op"], row["family"], cpu.partition(":")[0], cuda.partition(":")[0], row["schema"])
    Console().print(table)
