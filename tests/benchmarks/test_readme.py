"""The README and docs/measured.md quote what stands in benchmarks/results, and nothing else."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_are_made_from_the_rows() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert made["newest"](ROOT / "benchmarks" / "results"), "no rows to quote"
    for page, whole in made["PAGES"].items():
        text = page.read_text()
        assert made["rendered"](text, ROOT / "benchmarks" / "results", whole) == text, "run python benchmarks/readme.py"
