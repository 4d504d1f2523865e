"""Our ops as the Triton launches behind them: what stands in the program is what the launcher does, without the op.

Traced and run by follow_launches.py in a process of its own, without a GPU: kernels are compiled to Triton's own
representation (torch reads from it what they write) and interpreted. What a GPU compiles of them is not tested here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planmill import kernels

FEW = ["expert_mixture", "mutual_matching", "slot_weights"]


def run(script: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """The facts of each op, from a process that can compile kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    command = [sys.executable, "-P", "-W", "ignore", str(here / script), *arguments]
    environment["PYTHONPATH"] = str(here)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "assuming every input is mutated" not in done.stderr, done.stderr
    return {fact["op"]: fact for fact in map(json.loads, done.stdout.splitlines())}


def check(facts: dict[str, Any]) -> None:
    assert facts["called"] == []
    assert facts["written"] == []  # a kernel of which torch cannot tell what it writes would copy its inputs
    assert facts["alike"]


def test_a_program_launches_what_the_launchers_do() -> None:
    facts = run("follow_launches.py", *FEW)
    for name in ("expert_mixture", "slot_weights"):
        assert facts[name]["dynamic"]
        check(facts[name])
    assert facts["expert_mixture"]["kernels"] == {"combine_kernel": 1, "down_kernel": 1, "up_kernel": 1}
    assert facts["slot_weights"]["kernels"] == {"column_kernel": 1, "row_kernel": 1}
    refused = facts["mutual_matching"]["refused"]
    assert refused.startswith(
        "op planmill::mutual_matching cannot be inside the plan: its launcher chooses by size (Eq(batch, 2); otherwise "
        "at batch 1): narrow the range of batch, or fix all sizes"
    )
    assert "\n" not in refused


@pytest.mark.slow
def test_a_package_holds_the_kernels(tmp_path: Path) -> None:
    facts = run("compile_launches.py", str(tmp_path), "slot_weights")["slot_weights"]
    assert facts["kernels"] == {"column_kernel": 1, "row_kernel": 1}
    assert facts["binaries"] == 2
    assert not facts["called"]


@pytest.mark.slow
def test_every_op_stands_as_its_launches_or_is_refused() -> None:
    facts = run("follow_launches.py", *sorted(kernels.ops()))
    assert facts.keys() == kernels.ops().keys()
    for name, fact in facts.items():
        if fact["refused"]:
            assert name in fact["refused"]
        else:
            check(fact)
    assert sum(not fact["refused"] for fact in facts.values()) >= 36


@pytest.mark.slow
def test_every_op_that_can_is_in_its_package(tmp_path: Path) -> None:
    for fact in run("compile_launches.py", str(tmp_path), *sorted(kernels.ops())).values():
        assert fact["refused"] or (fact["binaries"] >= len(fact["kernels"]) and not fact["called"])
