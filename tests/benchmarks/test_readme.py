"""The README quotes what stands in benchmarks/results, and nothing else."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_made_from_the_rows() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    text = (ROOT / "README.md").read_text()
    assert made["newest"](ROOT / "benchmarks" / "results"), "no rows to quote"
    assert made["rendered"](text, ROOT / "benchmarks" / "results") == text, "run python benchmarks/readme.py"
