"""Private functions of torch with which Inductor runs reductions early.

before                                     after
  grad = mm(...)                             grad = mm(...)
  dx, h = kernel(grad, x, weight)            dw = kernel(grad, x).sum()
  dh = mm(h, ...)                            dx, h = kernel(grad, x, weight)
  dw = kernel(grad, x).sum()                 dh = mm(h, ...)

Inductor orders its kernels by who reads them, so that a gradient of a weight, which nobody reads, comes
after all that somebody does.  Until then its operands live, and what could be written over them is
written elsewhere.  On the CPU it is a function of its own besides, which takes half a second to compile,
where it would be part of its neighbour's: functions end where an operator is called.

A product that is a weight's gradient waits likewise, where reductions of several layers became one kernel.
It comes early if it lets go of more bytes than it makes.

Compiled and run on torch 2.13.0, 2.11.0 and 2.15.0.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch._inductor import config, custom_graph_pass

FEWER = 8
"""A reduction that makes so many times fewer bytes than it reads is run early."""

Nodes = list[Any]
_Base: Any = getattr(custom_graph_pass, "CustomSchedulerPass", object)  # 2.12 takes any callable


class EarlyReductions(_Base):
    """Inductor's kernels in another order: reductions come as soon as what they read is there.

    before: another such pass, which runs first.
    """

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, nodes: Nodes) -> Nodes:
        return early(self.before(nodes) if self.before else nodes)

    def uuid(self) -> Any:
        """What torch's cache of compiled graphs knows the pass by."""
        return "fxmem early reductions and products", FEWER, self.before and self.before.uuid()


def reductions_early() -> Any:
    """A context in which Inductor runs reductions early, after what is there to order its kernels."""
    before: Any = config._post_fusion_custom_pass
    ours: Any = EarlyReductions(before)
    if before is not None and not hasattr(before, "uuid"):
        ours = ours.__call__  # a function: torch caches nothing that one has ordered
    return config.patch(_post_fusion_custom_pass=ours)


def early(nodes: Nodes) -> Nodes:
    """What is early right after the last of what it waits for; all else in the order that it is in."""
    return [nodes[at] for at in sorted(range(len(nodes)), key=_Order(nodes).when)]


class _Order:
    """When each kernel runs.  place: of the kernel that makes a buffer.  readers: places by buffer."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.place = {name: at for at, node in enumerate(nodes) for name in node.get_buffer_names()}
        self.readers = defaultdict[str, list[int]](list)
        for at, node in enumerate(nodes):
            for dep in node.read_writes.reads:
                self.readers[dep.name].append(at)

    def when(self, at: int) -> tuple[int, int, int]:
        """After what they wait for reductions come first, which are one function with it."""
        node = self.nodes[at]
        places = (self.place.get(dep.name, -1) for dep in node.unmet_dependencies)
        awaited = max(places, default=-1)
        if _makes_little(node):
            return (awaited, 1, at)
        if self._is_a_last_product(node) and self._shrinks(at, awaited):
            return (awaited, 2, at)
        return (at, 0, at)

    def _is_a_last_product(self, node: Any) -> bool:
        """Is it a product of matrices that nobody reads before the half returns it?"""
        if not node.is_extern() or node.has_aliasing_or_mutation():
            return False
        name = getattr(node.node, "python_kernel_name", None)
        return name in _PRODUCTS and not any(map(self.readers.get, node.get_buffer_names()))

    def _shrinks(self, at: int, awaited: int) -> bool:
        """Right after what it waits for, does it let go of more bytes than it makes?"""
        node = self.nodes[at]
        read = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
        ends = {name for name in read if all(n <= awaited or n == at for n in self.readers[name])}
        return bool(sum(read[name] for name in ends) > node.get_write_buffer_sizes())


_PRODUCTS = ("extern_kernels.mm", "extern_kernels.addmm", "extern_kernels.bmm")


def _makes_little(node: Any) -> bool:
    if node.is_extern() or node.is_template() or not node.is_reduction():
        return False
    if node.has_aliasing_or_mutation():
        return False
    return bool(FEWER * node.get_write_buffer_sizes() <= node.get_read_buffer_sizes())
