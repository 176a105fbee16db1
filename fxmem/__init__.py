"""fxmem: fit a PyTorch training step into a byte budget, exactly.

opt = fxmem.optimize(model, "8GiB", (batch,))
loss = opt(batch)
loss.backward()
"""

from fxmem import trainers
from fxmem.api import liveness, optimize, plan
from fxmem.backend import plans
from fxmem.cost import CostModel
from fxmem.errors import (
    BudgetError,
    BudgetInfeasibleError,
    CaptureError,
    EncodingError,
    FxmemError,
    PlanMismatchError,
    VerificationError,
)
from fxmem.fits import Fits
from fxmem.gradient_noise import Noise
from fxmem.inventory import Liveness
from fxmem.looking import fits, report
from fxmem.lossless import ELEMENTS
from fxmem.lossy import LossyEncoding, register_encoding
from fxmem.measure import Measurement, measure
from fxmem.oom import Explanation, explain_oom
from fxmem.operators import declare_pure
from fxmem.plan import Plan
from fxmem.report import Report
from fxmem.runtime import OptimizedModule
from fxmem.saved import Saved, saved
from fxmem.sizing import max_batch, min_budget
from fxmem.step_report import StepReport

__version__ = "0.1.0"

__all__ = [
    "ELEMENTS",
    "BudgetError",
    "BudgetInfeasibleError",
    "CaptureError",
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
