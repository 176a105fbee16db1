"""Concatenations of the same values are there one after the other, not all at once."""

import contextlib

import torch
from test_fused import scheduled, told

from fxmem._torch import inductor as _torch_inductor


def densely(x, y, w):
    """Each product reads ``x`` and what was made last, as layers that are connected densely do."""
    first = torch.cat([x, y], 1) @ w
    second = torch.cat([x, first.sin()], 1) @ w
    third = torch.cat([x, second.sin()], 1) @ w
    return (third + x,)


GIVEN = torch.randn(32, 64), torch.randn(32, 64), torch.randn(128, 64)


def made(**how):
    """The concatenations that get memory of their own; one may lie where another one was."""
    wide = str(2 * GIVEN[0].nbytes)
    return [event.split()[1] for event in told(scheduled(densely, *GIVEN, **how)) if wide in event]


def test_a_backward_copies_to_one_at_a_time():
    assert made(backward=True) == ["buf2"]


def test_torch_copies_a_part_to_all_of_them(monkeypatch):
    how = contextlib.nullcontext
    monkeypatch.setattr(_torch_inductor, "one_concatenation_at_a_time", how)
    assert made(backward=True) == ["buf2", "buf6", "buf10"]


def test_a_forward_stays_as_torch_has_it():
    assert made() == ["buf2", "buf6", "buf10"]
