"""What transformers decides by looking at values, decided while it is traced, too.

Its models ask whether the tokens of one row belong to several packed sequences, which shows in the
positions.  Eager looks, sees one sequence, and attention needs no mask.  A traced step cannot look:
it makes a mask of every position with every other, and attention takes the kernel for masks, which is
slower, holds more and rounds otherwise.  Where the positions are computed from nothing but sizes they
can be computed while tracing; only then is eager's answer taken.

Checked with transformers 5.23.  Without that package, or where it has no such function, nothing happens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils import _pytree as pytree

ASKED = "find_packed_sequence_indices"
"""The function of ``transformers.masking_utils`` that says which sequence a token belongs to."""

_LIBRARY = torch.library.Library("fxmem", "FRAGMENT")
_LIBRARY.define("positions(Tensor positions) -> Tensor")
_LIBRARY.impl("positions", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("fxmem::positions", torch.empty_like, lib=_LIBRARY)
_positions = torch.ops.fxmem.positions.default
fx.node.has_side_effect(_positions)  # nobody reads it, and it must stay until it is looked at


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[bool]:
    """Inside, models hear that no row is packed; the positions stay in the graph to be checked.

    False where there is nobody to tell.
    """
    module = sys.modules.get("transformers.masking_utils")
    if not hasattr(module, ASKED):
        yield False
        return

    def answer(position_ids: torch.Tensor) -> None:
        torch.ops.fxmem.positions(position_ids)

    with mock.patch.object(module, ASKED, answer):
        yield True


def are_right(module: fx.GraphModule) -> bool:
    """Was the answer true of all positions, whatever the inputs hold?  Their nodes go if it was."""
    asked = [n for n in module.graph.nodes if n.target in (_positions, torch.ops.fxmem.positions)]
    ask = getattr(sys.modules.get("transformers.masking_utils"), ASKED, None)
    for node in asked:
        positions = _value(node.args[0])
        if positions is None or ask is None or ask(positions) is not None:
            return False
    for node in asked:
        module.graph.erase_node(node)
    if asked:
        module.graph.eliminate_dead_code()
        module.recompile()
    return True


def _value(node: Any) -> torch.Tensor | None:
    """What a node computes, on the CPU; None where that depends on anything but constants."""
    needed: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        one = stack.pop()
        if not isinstance(one, fx.Node) or one.op not in ("call_function", "call_method"):
            return None
        if one not in needed:
            needed[one] = None
            stack += one.all_input_nodes
    values: dict[fx.Node, Any] = {}
    for one in (n for n in node.graph.nodes if n in needed):
        values[one] = _run(one, values)
    found = values[node]
    return found if isinstance(found, torch.Tensor) else None


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def real(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return values[leaf]
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    args, kwargs = pytree.tree_map(real, (tuple(node.args), dict(node.kwargs)))
    if node.op == "call_method":
        receiver, *rest = args
        return getattr(receiver, str(node.target))(*rest, **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)
