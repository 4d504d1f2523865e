"""`import planmill` beyond `import torch`, in fresh processes; the peer is `import torch` itself, for scale."""

import subprocess
import sys
from collections.abc import Callable

from ..cases import Case, Goal, Peer

_PROGRAM = "import time; {before}; start = time.perf_counter(); {timed}; print(1e3 * (time.perf_counter() - start))"


def _milliseconds(before: str, timed: str) -> Callable[[], float]:
    program = _PROGRAM.format(before=before, timed=timed)

    def run() -> float:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return float(done.stdout)

    return run


PEERS = {"import torch": Peer(lambda: _milliseconds("pass", "import torch"), yardstick=True)}

CASES = [
    Case(
        op="import_time",
        id=module,
        make=lambda draw: (),
        ours=_milliseconds("import torch", f"import {module}"),
        peers=PEERS,
        devices=("cpu",),
        goals=(Goal("time", 300),) if module == "planmill" else (),
        reports_ms=True,
    )
    # planmill loads its parts on first use: the second case says what the first op costs.
    for module in ("planmill", "planmill.kernels")
]
