"""A whole run: models -> data -> teacher cache -> warm-up -> ranking -> staged training -> evaluation -> report.

`run(recipe)` does what is missing in the recipe's output folder and nothing else; `plan(recipe)` says what it would do.
"""

from pocl.pipeline.plan import Plan, plan
from pocl.pipeline.run import run

__all__ = ["Plan", "plan", "run"]
