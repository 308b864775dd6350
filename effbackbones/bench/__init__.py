"""Speed and memory of models, operators and attention backends, compared within one run.

What is measured is in `cases` (names and settings) and `subjects` (the call that is timed; `operators` for those of
`effbackbones.ops`), how in `timing` and `memory`, what comes of it in `run` and `report`. `data` is apart: it measures
the loader of a recipe.
"""

from effbackbones.bench.cases import BenchError, Case, plan
from effbackbones.bench.operators import Example, operator
from effbackbones.bench.report import NOTES, Report
from effbackbones.bench.run import Effort, Result, measure, threads

__all__ = [
    "NOTES",
    "BenchError",
    "Case",
    "Effort",
    "Example",
    "Report",
    "Result",
    "measure",
    "operator",
    "plan",
    "threads",
]
