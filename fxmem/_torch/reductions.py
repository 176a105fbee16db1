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

Compiled and run on torch 2.13.0, 2.11.0 and 2.15.0.
"""

from __future__ import annotations

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
        return "fxmem early reductions", FEWER, self.before and self.before.uuid()


def reductions_early() -> Any:
    """A context in which Inductor runs reductions early, after what is there to order its kernels."""
    before: Any = config._post_fusion_custom_pass
    ours: Any = EarlyReductions(before)
    if before is not None and not hasattr(before, "uuid"):
        ours = ours.__call__  # a function: torch caches nothing that one has ordered
    return config.patch(_post_fusion_custom_pass=ours)


def early(nodes: Nodes) -> Nodes:
    """Reductions right after the last of what they wait for; all else in the order that it is in."""
    place = {name: at for at, node in enumerate(nodes) for name in node.get_buffer_names()}

    def when(at: int) -> tuple[int, int]:
        awaited = (place.get(dep.name, -1) for dep in nodes[at].unmet_dependencies)
        return (max(awaited, default=-1) if _makes_little(nodes[at]) else at, at)

    return [nodes[at] for at in sorted(range(len(nodes)), key=when)]


def _makes_little(node: Any) -> bool:
    if node.is_extern() or node.is_template() or not node.is_reduction():
        return False
    if node.has_aliasing_or_mutation():
        return False
    return bool(FEWER * node.get_write_buffer_sizes() <= node.get_read_buffer_sizes())
