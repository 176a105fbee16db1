"""One plan for all processes of a job: of those that plan the same step, the first one's counts.

Nobody waits for anybody, so ranks that plan other steps, or none, never hang a job.  Plans that differ
would be no error: what talks to other processes is never run twice.  But ranks run in lockstep, and the
slowest plan would set the pace of all.
"""

from __future__ import annotations

import hashlib
import json
import logging

import torch

from fxmem._torch import distributed as _torch_distributed
from fxmem.basics.errors import FxmemError
from fxmem.planning.plan import Plan

log = logging.getLogger(__name__)

_OF_EACH_MACHINE = ("auto", "%")


def agreed(plan: Plan) -> Plan:
    """The plan that all ranks run which plan this step for this budget; this one if it is the first."""
    store = _torch_distributed.shared_store()
    if store is None or plan.noise is not None:  # noise is measured on each rank's own data
        return plan
    text = json.dumps(plan.to_dict(), allow_nan=False)
    try:
        first = store.compare_set(f"fxmem/{question(plan)}", "", text)
        if isinstance(first, bytes):
            first = first.decode()
        theirs = Plan.parse(first)
    except (RuntimeError, FxmemError) as error:
        log.warning("the ranks could not compare their plans: %s", str(error).splitlines()[0])
        return plan
    if hashed(theirs) == hashed(plan):
        return plan
    log.info("another rank planned this step first; its plan %s is run", hashed(theirs)[:8])
    return theirs


def question(plan: Plan) -> str:
    """A hash of what was planned for: equal on ranks that should run one plan."""
    device_decides = plan.asked.strip().endswith(_OF_EACH_MACHINE)
    asked = (
        plan.step,
        plan.model,
        sorted(plan.symbols.items()),
        torch.device(plan.device).type,
        plan.asked,
        0 if device_decides or plan.smallest else plan.budget,
        plan.reserve,
        plan.resident,
        plan.keep_all_peak,
    )
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:32]


def hashed(plan: Plan) -> str:
    """A hash of what a plan does."""
    done = [(d.key, d.action, d.times, d.dropped, d.nbytes_stored) for d in plan.decisions]
    return hashlib.sha256(repr((plan.fingerprint, done)).encode()).hexdigest()
