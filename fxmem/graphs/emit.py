"""One straight line of Python for a graph: as little as possible between two operators.

before (a graph)                     after (a function of a list)
  %t    = aten.t(%w)                   w, x, = args
  %mm   = aten.mm(%x, %t)              args.clear()
  %view = aten.view(%mm, [2, 8, 4])    t = w.t(); w = None
  return (%view,)                      mm = aten_mm_default(x, t); t = x = None
                                       view = mm.view([2, 8, 4]); mm = None
                                       return [view]

The function owns the only reference to what it was given, and lets go of each value in the line
that reads it last, so memory is freed when the liveness analysis says so.  Next to fx's own code
it skips the Python half of an operator's call, which on small tensors takes longer than the work.
"""

from __future__ import annotations

import itertools
import keyword
import linecache
import math
import operator
import weakref
from typing import Any

import torch
from torch import fx

from fxmem._torch import BoxedCallable, autograd_off, mark_boxed

aten = torch.ops.aten

# Views whose method takes the operator's arguments as they are; a method call is twice as fast.
_METHODS: dict[Any, str] = {
    aten.expand.default: "expand",
    aten.permute.default: "permute",
    aten.t.default: "t",
    aten.transpose.int: "transpose",
    aten.unsqueeze.default: "unsqueeze",
    aten.view.default: "view",
}

_serial = itertools.count()


def boxed(module: fx.GraphModule) -> BoxedCallable:
    """What AOTAutograd runs for a graph: a function of a list of arguments, which it empties."""
    function = emit(module)

    def run(args: list[Any]) -> Any:
        with autograd_off():  # the backward is in a graph already
            return function(args)

    return mark_boxed(run)


def emit(module: fx.GraphModule) -> BoxedCallable:
    """The module's graph as a function of its inputs in a list, which it empties."""
    writer = _Writer(module)
    source = writer.source()
    file = f"<fxmem graph {next(_serial)}>"
    exec(compile(source, file, "exec"), writer.names)
    # Tracebacks show the line that failed.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    function: BoxedCallable = writer.names["run"]
    weakref.finalize(function, linecache.cache.pop, file, None)
    return function


class _Writer:
    """Writes the function.  names: what its code refers to beside its own variables."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.names: dict[str, Any] = {}
        self.known: dict[tuple[bool, int], str] = {}
        # What starts the names that are ours: nothing that a node is called.
        self.prefix = "fxmem"
        while any(n.name.startswith(self.prefix) for n in self.nodes):
            self.prefix = f"_{self.prefix}"

    def source(self) -> str:
        dying = self._last_uses()
        given = [n for n in self.nodes if n.op == "placeholder"]
        lines = []
        if given:
            lines.append("".join(f"{n.name}, " for n in given) + f"= {self.prefix}_args")
        lines.append(f"{self.prefix}_args.clear()")
        lines += [f"{n.name} = None" for n in given if not n.users]
        for node in self.nodes:
            if node.op == "output":
                lines.append(f"return {self._text(list(node.args[0]))}")
            elif node.op != "placeholder":
                forget = "".join(f"{n.name} = " for n in dying.get(node, ()))
                lines.append(f"{node.name} = {self._call(node)}")
                lines[-1] += f"; {forget}None" if forget else ""
        return f"def run({self.prefix}_args):\n" + "".join(f"    {line}\n" for line in lines)

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """Reader -> what nobody reads after it.  A result that nobody reads dies with its maker."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node.op not in ("placeholder", "output"):
                last[node] = node
            for source in node.all_input_nodes:
                last[source] = node
        dying: dict[fx.Node, list[fx.Node]] = {}
        for source, reader in last.items():
            dying.setdefault(reader, []).append(source)
        return dying

    def _call(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self._name(operator.attrgetter(str(node.target))(self.module), node.name)
        if node.op != "call_function":
            raise NotImplementedError(f"a joint graph has no {node.op} nodes: {node.format_node()}")
        if node.target is operator.getitem:
            return f"{self._text(node.args[0])}[{self._text(node.args[1])}]"
        arguments = [self._text(a) for a in node.args]
        arguments += [self._keyword(key, value) for key, value in node.kwargs.items()]
        method = _METHODS.get(node.target)
        if method is not None and node.args and isinstance(node.args[0], fx.Node):
            return f"{arguments[0]}.{method}({', '.join(arguments[1:])})"
        return f"{self._callee(node)}({', '.join(arguments)})"

    def _callee(self, node: fx.Node) -> str:
        """The name of what a node calls: of an operator's C++ entry, where Python adds nothing."""
        target: Any = node.target
        if type(target) is torch._ops.OpOverload:
            return self._name(target._op, str(target), called=target)
        return self._name(target, node.name)

    def _keyword(self, key: str, value: Any) -> str:
        text = self._text(value)
        return f"**{{{key!r}: {text}}}" if keyword.iskeyword(key) else f"{key}={text}"

    def _text(self, value: Any) -> str:
        """An argument as an expression."""
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._text(v)}, ' for v in value)})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k!r}: {self._text(v)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(map(self._text, parts))})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        return self._name(value, type(value).__name__)

    def _name(self, value: Any, hint: str, called: object = None) -> str:
        """The global name of a value that has no literal.  called: the operator that it runs."""
        key = (called is not None, id(called or value))
        if key not in self.known:
            plain = "".join(c if c.isalnum() else "_" for c in hint)
            self.known[key] = f"{self.prefix}_{len(self.names)}_{plain}"
            self.names[self.known[key]] = value
        return self.known[key]
