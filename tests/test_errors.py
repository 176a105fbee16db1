"""Errors survive a copy and another process: those that carry more than their message, too."""

import copy
import pickle

import pytest

from fxmem.basics import errors

EXAMPLES = [
    errors.FxmemError("said"),
    errors.BudgetInfeasibleError("said", smallest_peak=3, best_plan=None, why="so"),
    errors.CaptureError("said", reason="so", place="there"),
    errors.FixedSizeError("said", fixed="B=8", reason="so", place="there"),
    errors.CompileError("said", reason="so", place="there"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_copy_says_the_same(error):
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is type(error)
        assert str(again) == "said"
        assert vars(again) == vars(error)
