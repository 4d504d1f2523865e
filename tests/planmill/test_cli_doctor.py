"""`planmill doctor`, `planmill ops`, `--version`."""

import json

from typer.testing import CliRunner

import planmill
from planmill import kernels
from planmill.cli import app


def test_doctor_reports_every_op_on_both_devices() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert {(row["op"], row["device"]) for row in report["ops"]} == {
        (n, d) for n in kernels.ops() for d in ("cpu", "cuda")
    }
    assert report["cpu"]["instruction_sets"] == list(kernels.cpu_capabilities())


def test_doctor_prints_a_table() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "mutual_score" in result.output


def test_ops_lists_schemas() -> None:
    rows = json.loads(CliRunner().invoke(app, ["ops", "--json"]).output)
    assert [row["op"] for row in rows] == list(kernels.ops())
    assert CliRunner().invoke(app, ["ops"]).exit_code == 0


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"planmill {planmill.__version__}"
