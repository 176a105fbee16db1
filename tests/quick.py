"""Which parameters a quick run takes; the others are marked slow."""

import pytest


def but_slow(values, quick):
    """The values; those that are not among ``quick`` are slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]
