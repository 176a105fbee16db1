"""fxmem: fit a PyTorch training step into a byte budget, exactly.

opt = fxmem.optimize(model, "8GiB", (batch,))
loss = opt(batch)
loss.backward()
"""

from fxmem import trainers
from fxmem.analysis.cost import CostModel
from fxmem.api import liveness, optimize, plan
from fxmem.backend import plans
from fxmem.basics.errors import (
    BudgetError,
    BudgetInfeasibleError,
    CaptureError,
    CompileError,
    EncodingError,
    FxmemError,
    PlanMismatchError,
    VerificationError,
)
from fxmem.codes.gradient_noise import Noise
from fxmem.codes.lossless import ELEMENTS
from fxmem.codes.lossy import LossyEncoding, register_encoding
from fxmem.graphs.measure import Measurement, measure
from fxmem.graphs.operators import declare_pure
from fxmem.looking import fits, report
from fxmem.planning.plan import Plan
from fxmem.reports.fits import Fits
from fxmem.reports.oom import Explanation, explain_oom
from fxmem.reports.report import Report
from fxmem.reports.saved import Saved, saved
from fxmem.sizing import max_batch, min_budget
from fxmem.steps.inventory import Liveness
from fxmem.steps.runtime import OptimizedModule
from fxmem.steps.step_report import StepReport

__version__ = "0.1.0"

__all__ = [
    "ELEMENTS",
    "BudgetError",
    "BudgetInfeasibleError",
    "CaptureError",
    "CompileError",
    "CostModel",
    "EncodingError",
    "Explanation",
    "Fits",
    "FxmemError",
    "Liveness",
    "LossyEncoding",
    "Measurement",
    "Noise",
    "OptimizedModule",
    "Plan",
    "PlanMismatchError",
    "Report",
    "Saved",
    "StepReport",
    "VerificationError",
    "declare_pure",
    "explain_oom",
    "fits",
    "liveness",
    "max_batch",
    "measure",
    "min_budget",
    "optimize",
    "plan",
    "plans",
    "register_encoding",
    "report",
    "saved",
    "trainers",
]
