"""What fxmem raises. Each error says what was asked, what was found and what would work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxmem.planning.plan import Plan


class FxmemError(Exception):
    """Base of every error that fxmem raises on purpose.  Errors can be copied and pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self.args, vars(self))


def _made_again(kind: type[FxmemError], args: tuple[Any, ...], more: dict[str, Any]) -> FxmemError:
    error = kind.__new__(kind, *args)
    vars(error).update(more)
    return error


class BudgetError(FxmemError, ValueError):
    """A budget that cannot be read, or that cannot be resolved on this device."""


class BudgetInfeasibleError(BudgetError):
    """No plan that fxmem found peaks at or below the budget.

    smallest_peak: bytes, the lowest peak any plan was shown to reach; ``best_plan`` reaches it.
    why: the tensors that make that peak, one line each, ready to print.
    """

    def __init__(self, message: str, *, smallest_peak: int, best_plan: Plan, why: str) -> None:
        super().__init__(message)
        self.smallest_peak = smallest_peak
        self.best_plan = best_plan
        self.why = why


class CaptureError(FxmemError):
    """The step could not be captured as one graph; the message quotes the user's line.

    reason, place: what went wrong and the user's line by themselves, where they are known.
    """

    def __init__(self, message: str, *, reason: str = "", place: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.place = place


class FixedSizeError(CaptureError):
    """A size that was to vary is a constant in the user's code.

    fixed: ``B=8``, or several such.
    """

    def __init__(self, message: str, *, fixed: str, reason: str = "", place: str = "") -> None:
        super().__init__(message, reason=reason, place=place)
        self.fixed = fixed

    @property
    def short(self) -> str:
        """``the step works with B=8 alone (model.py:12 in forward)``"""
        line = self.place.split(": ")[0].rsplit("/", 1)[-1]
        return f"the step works with {self.fixed} alone" + (f" ({line})" if line else "")


class CompileError(FxmemError):
    """Inductor made no code of the step, or code that does not run; its own error is the cause.

    reason, place: what went wrong, and the operator with the user's line, where they are known.
    """

    def __init__(self, message: str, *, reason: str = "", place: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.place = place


class PlanMismatchError(FxmemError):
    """A plan was made for another model, another shape or another version of the file format."""


class VerificationError(FxmemError):
    """A rewritten graph, or a measured step, breaks what the plan promised."""


class EncodingError(FxmemError, TypeError):
    """An encoding was given a tensor that it does not take, or arguments that make no code."""
