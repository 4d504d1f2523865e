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

FEW = ["expert_mixture", "mahalanobis", "segmented_min", "slot_weights"]


def follow(names: list[str]) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("follow_launches.py")
    run = [sys.executable, "-P", "-W", "ignore", str(script), *names]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "assuming every input is mutated" not in done.stderr, done.stderr
    return {fact["op"]: fact for fact in map(json.loads, done.stdout.splitlines())}


def check(facts: dict[str, Any]) -> None:
    assert facts["called"] == []
    assert facts["written"] == []  # a kernel of which torch cannot tell what it writes would copy its inputs
    assert facts["alike"]


def test_a_program_launches_what_the_launchers_do() -> None:
    facts = follow(FEW)
    for name in ("segmented_min", "slot_weights"):
        assert facts[name]["dynamic"]
        check(facts[name])
    assert facts["segmented_min"]["kernels"] == {"encode_kernel": 2, "search_kernel": 1, "settle_kernel": 1}
    assert facts["slot_weights"]["kernels"] == {"column_kernel": 1, "row_kernel": 1}
    refused = facts["expert_mixture"]["refused"]
    assert refused.startswith(
        "op planmill::expert_mixture cannot be inside the plan: sort_experts is CUDA C++ (csrc/cu"
    )
    assert "\n" not in refused
    refused = facts["mahalanobis"]["refused"]
    assert "its launcher chooses by size (batch <= 4; otherwise at batch 5): narrow the range of batch" in refused


@pytest.mark.slow
def test_every_op_stands_as_its_launches_or_is_refused() -> None:
    facts = follow(sorted(kernels.ops()))
    assert facts.keys() == kernels.ops().keys()
    for name, fact in facts.items():
        if fact["refused"]:
            assert name in fact["refused"]
        else:
            check(fact)
    assert sum(not fact["refused"] for fact in facts.values()) >= 20
