"""Private functions of torch with which Inductor copies into one concatenation at a time.

before                                     after
  a[:, :8], b[:, :8], c[:, :8] = x, x, x     a[:, :8] = x
  a[:, 8:] = y                               a[:, 8:] = y
  dx = ...(a)                                dx = ...(a)
  b[:, 8:16] = z                             b[:, :8], b[:, 8:16] = x, z
  dy = ...(b)                                dy = ...(b)

A concatenation is memory that its parts are copied to.  Layers that are connected densely concatenate the
same parts, and where a backward makes these values again, Inductor makes one kernel of all copies of a
part.  So all concatenations are there from the first to the last.  To read a part once more takes little.

Compiled and run on torch 2.13.0, 2.11.0 and 2.15.0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch._inductor.choices import InductorChoices
from torch._inductor.ir import NonOwningLayout

ONE_AT_A_TIME = "one concatenation at a time"
"""What torch's cache of compiled graphs knows it by."""


def one_concatenation_at_a_time() -> AbstractContextManager[Any]:
    """A context in which kernels that copy to several concatenations are not made one."""
    before = InductorChoices.can_fuse_horizontal

    def may_be_one(scheduler: Any, node: Any, other: Any, shared: int) -> bool:
        one, another = _memory_of(node), _memory_of(other)
        if one and another and one != another:
            return False
        return bool(before(scheduler, node, other, shared))

    return mock.patch.object(InductorChoices, "can_fuse_horizontal", staticmethod(may_be_one))


def _memory_of(node: Any) -> set[str]:
    """Names of the concatenations that a kernel copies to."""
    layouts = (getattr(part.node, "layout", None) for part in node.get_nodes())
    return {layout.view.get_name() for layout in layouts if isinstance(layout, NonOwningLayout)}
