"""Arms of one recipe side by side, with intervals: does the curriculum, or any other setting, help here?"""

from pocl.compare.arms import ARMS, Arm
from pocl.compare.plan import ComparisonPlan, plan_comparison
from pocl.compare.run import compare

__all__ = ["ARMS", "Arm", "ComparisonPlan", "compare", "plan_comparison"]
