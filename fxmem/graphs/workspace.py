"""Operator workspaces: what an operator allocates and frees inside, invisible to the graph.

A convolution's backward reorders its operands, a reduction keeps partial sums, a type promotion
casts a copy: none of it shows in the graph, all of it counts at the peak.  Each distinct operator
signature is run once on throwaway tensors of the same shapes and strides, and the allocator is
asked.  One operator at a time holds no more than the step itself does when it runs that operator.

The same run tells what the operator really returns, where fake tensors guess otherwise: strides,
which decide whether the next operator copies its operand first, and storages larger than their
tensor (a mean-reduced loss keeps the storage of its elements).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmem._torch import (
    fake_tensors_off,
    run_and_save_rng_state,
    run_with_rng_state,
    storage_key,
)
from fxmem._torch.profiler import session_if_free, sizes_apart
from fxmem.basics.device import free_memory
from fxmem.basics.sizes import CUDA_BLOCK, hint, is_plain, tensors_in
from fxmem.graphs.graph import is_view, operator_name
from fxmem.graphs.measure import cpu_allocations

T = TypeVar("T")

LAYOUT = "fxmem_strides"
"""Node metadata: the strides really returned, one tuple a tensor, where fake ones differ."""


def lies_plainly(node: fx.Node) -> bool:
    """Is the tensor laid out as operators lay their results out, as far as anybody knows?"""
    return LAYOUT not in node.meta and is_plain(node.meta["val"])


# -- Signatures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its bytes.

    room: elements that its storage has from the first of them on; 0 where that does not matter.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    room: int = 0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        strides = "x".join(map(str, self.strides))
        room = f"+{self.room}" if self.room else ""
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}]/{strides}{room}"

    @property
    def nbytes(self) -> int:
        """Bytes of the storage that such a tensor needs."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def empty(self, device: torch.device | str) -> torch.Tensor:
        if self.room:
            whole = torch.empty(self.room, dtype=self.dtype, device=device)
            return whole.as_strided(self.shape, self.strides)
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def stand_in(self, device: torch.device) -> torch.Tensor:
        """A real tensor of this kind; zeros are valid as indices too."""
        tensor = self.empty(device)
        return tensor.fill_(1) if self.dtype.is_floating_point else tensor.zero_()


IMPLEMENTATIONS: dict[str, Callable[[], str]] = {}
"""Namespace of operators -> what says which code they run, where torch's version does not."""


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, tensors replaced by their specs."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, target: Any, args: Any, kwargs: Any) -> Call:
        """A call on tensors (fake ones will do); symbolic sizes take the example's values."""
        return cls(target, *_specs(target, (tuple(args), dict(kwargs))))

    @classmethod
    def of_node(cls, node: fx.Node, specs: Callable[[fx.Node], Any] | None = None) -> Call:
        """The operator that a node runs, looked at through random replay.

        specs: what stands for the value of a node; by default ``node_specs``.
        """
        target: Any = node.target
        args: Any = tuple(node.args)
        if target is run_and_save_rng_state:
            target, args = args[0], args[1:]
        elif target is run_with_rng_state:
            target, args = args[1], args[2:]
        of_value, of_leaf = specs or node_specs, _leaf_spec(target)

        def spec(x: Any) -> Any:
            return _mapped(of_leaf, of_value(x)) if isinstance(x, fx.Node) else of_leaf(x)

        return cls(target, *fx.node.map_aggregate((args, dict(node.kwargs)), spec))

    @property
    def signature(self) -> str:
        """Operator, shapes, strides, types and constants: what its workspace depends on."""
        which = IMPLEMENTATIONS.get(getattr(self.target, "namespace", ""), str)()
        given = ", ".join(map(str, pytree.tree_leaves((self.args, self.kwargs))))
        return f"{self.target}{which}({given})"

    def stand_ins(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Throwaway arguments; on the meta device they hold nothing."""
        make = TensorSpec.empty if device.type == "meta" else TensorSpec.stand_in
        args, kwargs = pytree.tree_map_only(
            TensorSpec, lambda s: make(s, device), (self.args, self.kwargs)
        )
        if self.target in _SEEDED_FROM_THE_CPU and device.type == "cuda":
            seed, offset = _SEEDED_FROM_THE_CPU[self.target]
            args = tuple(a.cpu() if i in (seed, offset) else a for i, a in enumerate(args))
        return args, kwargs

    def operand_bytes(self) -> int:
        specs = pytree.tree_leaves((self.args, self.kwargs))
        return sum(s.nbytes for s in specs if isinstance(s, TensorSpec))


_SEEDED_FROM_THE_CPU: dict[Any, tuple[int, int]] = {
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: (6, 7),
}
"""Kernels on CUDA that read two arguments, at these places, on the CPU; fake tensors say otherwise."""

_COPIES_STORAGES = {torch.ops.aten.copy.default}
"""Operators that copy the whole storage under a view, and return a view of that."""


def _specs(target: Any, arguments: Any) -> Any:
    return pytree.tree_map(_leaf_spec(target), arguments)


def _leaf_spec(target: Any) -> Callable[[Any], Any]:
    return _spec if target in _COPIES_STORAGES else _spec_without_room


def _spec_without_room(value: Any) -> Any:
    spec = _spec(value)
    if isinstance(spec, TensorSpec) and spec.room:
        return TensorSpec(spec.shape, spec.strides, spec.dtype)
    return spec


def _spec(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        shape, strides = map(hint, value.shape), map(hint, value.stride())
        room = hint(value.untyped_storage().nbytes()) // value.element_size()
        return TensorSpec(
            tuple(shape), tuple(strides), value.dtype, room - hint(value.storage_offset())
        )
    return hint(value) if isinstance(value, torch.SymInt) else value


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``tree_map``, which takes its time even over a single leaf: most values are one."""
    if isinstance(value, (torch.Tensor, TensorSpec)):
        return function(value)
    return pytree.tree_map(function, value)


def node_specs(node: fx.Node) -> Any:
    """The specs of a node's value, with the strides that it really has."""
    specs = _mapped(_spec, node.meta.get("val"))
    strides = node.meta.get(LAYOUT)
    if strides is None:
        return specs
    leaves, tree = pytree.tree_flatten(specs)
    real = iter(strides)
    leaves = [replace(x, strides=next(real)) if isinstance(x, TensorSpec) else x for x in leaves]
    return pytree.tree_unflatten(leaves, tree)


# -- The table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Bytes of the workspace and of the operands; the results' strides and storages (bytes)."""

    nbytes: int
    operands: int
    strides: tuple[tuple[int, ...], ...]
    storages: tuple[int, ...]

    @property
    def held(self) -> int:
        """Bytes of operands and results."""
        return self.operands + sum(self.storages)


class Workspaces:
    """What is known by operator signature.

    An unknown signature is taken to need as much, next to its operands and results, as known ones
    of the same operator that are about as large; a wholly unknown operator counts as 0 bytes.
    """

    def __init__(self, table: dict[str, Entry] | None = None, on_disk: int = 0) -> None:
        self.table = dict(table or {})
        self.on_disk = on_disk  # how many of the entries came from the file
        self._refused: set[str] = set()  # signatures that throwaway values cannot run
        self._kin: dict[str, dict[int, float]] = {}  # operator -> bytes held -> largest share
        self._guesses: dict[str, int] = {}  # by signature

    def nbytes(self, node: fx.Node) -> int:
        """Largest bytes that the operator holds beyond its inputs and outputs."""
        if not self.table or not has_workspace(node):
            return 0
        call = Call.of_node(node)
        key = call.signature
        entry = self.table.get(key)
        if entry is not None:
            workspace = entry.nbytes
        else:
            workspace = 0 if key in self._refused else self._guess(key, call, node)
        return workspace + generator_state(node)

    def _guess(self, key: str, call: Call, node: fx.Node) -> int:
        if key not in self._guesses:
            self._guesses[key] = self._estimated(call, node)
        return self._guesses[key]

    def _estimated(self, call: Call, node: fx.Node) -> int:
        if not self._kin:
            for signature, entry in self.table.items():
                kin = self._kin.setdefault(signature.partition("(")[0], {})
                share = entry.nbytes / max(entry.held, 1)
                kin[entry.held] = max(share, kin.get(entry.held, 0.0))
        made = {
            storage_key(t): hint(t.untyped_storage().nbytes())
            for t in tensors_in(node.meta.get("val"))
        }
        held = call.operand_bytes() + sum(made.values())
        known = self._kin.get(str(call.target), {})
        distances = [abs(math.log2((other + 1) / (held + 1))) for other in known]
        nearest = min(distances, default=0.0)
        near = (s for s, d in zip(known.values(), distances, strict=True) if d <= nearest + 1)
        return int(held * max(near, default=0.0))

    def calibrated(self, graph: fx.Graph, device: torch.device) -> Workspaces:
        """This table and what it lacks for ``graph``, measured now; real strides go on the nodes."""
        table = Workspaces(self.table, self.on_disk)
        table._refused |= self._refused
        for node in graph.nodes:
            if has_workspace(node):
                entry = table.look_up(Call.of_node(node), device)
                if entry is not None:
                    _note_strides(node, entry.strides)
                    _note_storages(node, entry.storages)
            elif node.op == "call_function" and is_view(node):
                _derive_strides(node)
        return table

    def look_up(self, call: Call, device: torch.device) -> Entry | None:
        """The entry of a call, measured if it is missing; None where it cannot be."""
        key = call.signature
        if key not in self.table and key not in self._refused and can_measure(call, device):
            entry = measure_call(call, device)
            if entry is None:
                self._refused.add(key)
            else:
                self.table[key] = entry
                self._kin.clear()
                self._guesses.clear()
        return self.table.get(key)


def has_workspace(node: fx.Node) -> bool:
    if node.op != "call_function" or is_view(node):
        return False
    replayed = node.target in (run_and_save_rng_state, run_with_rng_state)
    if not replayed and not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(True for _ in tensors_in(node.meta.get("val")))


def generator_state(node: fx.Node) -> int:
    """Bytes of the state that a replay holds meanwhile, to put the generator back afterwards."""
    if node.target is not run_with_rng_state:
        return 0
    state: Any = node.args[0]
    return int(state.meta["val"].numel())


def _note_strides(node: fx.Node, strides: tuple[tuple[int, ...], ...]) -> None:
    node.meta.pop(LAYOUT, None)
    if node.target in (run_and_save_rng_state, run_with_rng_state):
        return
    specs = [s for s in pytree.tree_leaves(node_specs(node)) if isinstance(s, TensorSpec)]
    if len(specs) == len(strides) and any(
        s.strides != real and 0 not in s.shape for s, real in zip(specs, strides, strict=True)
    ):
        node.meta[LAYOUT] = strides


def _note_storages(node: fx.Node, storages: tuple[int, ...]) -> None:
    """Let the example value's storages be as large as the real ones."""
    tensors = list(tensors_in(node.meta.get("val")))
    if len(tensors) != len(storages):
        return
    for tensor, nbytes in zip(tensors, storages, strict=True):
        storage = tensor.untyped_storage()
        if isinstance(storage.nbytes(), int) and storage.nbytes() < nbytes:
            storage.resize_(nbytes)


def _derive_strides(node: fx.Node) -> None:
    """A view of a tensor with other strides than its fake twin has other strides, too."""
    node.meta.pop(LAYOUT, None)
    if not any(LAYOUT in source.meta for source in node.all_input_nodes):
        return
    call = Call.of_node(node)
    if operator_name(node) == "getitem":
        taken = call.args[0][call.args[1]]
        strides = tuple(s.strides for s in pytree.tree_leaves(taken) if isinstance(s, TensorSpec))
    else:
        try:
            result = _run(call, torch.device("meta"))
        except (RuntimeError, ValueError):
            return  # a view that the real strides do not allow: the fake ones have to do
        strides = tuple(t.stride() for t in tensors_in(result))
    _note_strides(node, strides)


# -- Measuring ----------------------------------------------------------------------------------------


def measure_call(call: Call, device: torch.device) -> Entry | None:
    """Run an operator once on throwaway tensors; None where it refuses them."""
    return on_stand_ins(_measure_cuda if device.type == "cuda" else _measure_cpu, call, device)


def on_stand_ins(
    measure: Callable[[Call, torch.device], T], call: Call, device: torch.device
) -> T | None:
    """What is measured of a call, generators left as they are; None where the operator refuses."""
    if _reads_opaque(call):
        return None
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with generators, torch.no_grad(), fake_tensors_off():
        try:
            return measure(call, device)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            return None


def can_measure(call: Call, device: torch.device) -> bool:
    """Is there such a device, and room on it?"""
    return device.type in ("cpu", "cuda") and _fits(call, device)


def _reads_opaque(call: Call) -> bool:
    """Does the operator read what only its own forward can write, and trust it blindly?

    A recurrent layer's backward follows pointers in its workspace: throwaway bytes there crash.
    """
    schema = getattr(call.target, "_schema", None)
    names = {a.name for a in schema.arguments} if schema is not None else set()
    return bool(names & {"workspace", "reserve", "reserveSpace"})


def _run(call: Call, device: torch.device) -> Any:
    args, kwargs = call.stand_ins(device)
    return call.target(*args, **kwargs)


def _measure_cpu(call: Call, device: torch.device) -> Entry:
    args, kwargs = call.stand_ins(device)
    sizes, result = _allocations(lambda: call.target(*args, **kwargs))
    held = highest = 0
    for size in sizes:
        held += size
        highest = max(highest, held)
    return _entry(call, highest, result, (args, kwargs))


def _allocations(function: Callable[[], Any]) -> tuple[list[int], Any]:
    """As ``cpu_allocations``, also within a session: this thread's, or one of another thread.

    The first call of a model, and so its planning, may well be what a user is profiling.
    """
    with session_if_free() as free:
        return cpu_allocations(function) if free else sizes_apart(function)


def _measure_cuda(call: Call, device: torch.device) -> Entry:
    _run(call, device)  # the first call makes handles and tunes kernels, which later calls keep
    args, kwargs = call.stand_ins(device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    result = call.target(*args, **kwargs)
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_stats(device)
    # Not what is allocated: a block that is cached already is handed out whole if it is a little
    # too large, and which one is depends on what ran before.
    asked = "requested_bytes.all."
    highest = after[asked + "peak"] - before[asked + "current"]
    entry = _entry(call, highest, result, (args, kwargs))
    return replace(entry, nbytes=_in_several_blocks(entry.nbytes))


_SEVERAL = 8
"""Requests of an operator, each rounded up to a block, that its workspace has room for."""


def _in_several_blocks(nbytes: int) -> int:
    return nbytes and (-(-nbytes // CUDA_BLOCK) + _SEVERAL - 1) * CUDA_BLOCK


def _entry(call: Call, highest: int, result: Any, given: Any) -> Entry:
    result = _asked_for(call, result)
    old = {storage_key(t) for t in tensors_in(given)}
    new = {storage_key(t): t.untyped_storage().nbytes() for t in tensors_in(result)}
    fresh = sum(nbytes for key, nbytes in new.items() if key not in old)
    return Entry(
        max(0, highest - fresh),
        call.operand_bytes(),
        tuple(tuple(t.stride()) for t in tensors_in(result)),
        tuple(new[storage_key(t)] for t in tensors_in(result)),
    )


def _asked_for(call: Call, result: Any) -> Any:
    """What an output mask asks for.  Some kernels return more, which goes as soon as they end."""
    schema = getattr(call.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    if "output_mask" not in names or not isinstance(result, (tuple, list)):
        return result
    place = names.index("output_mask")
    mask = call.args[place] if place < len(call.args) else call.kwargs.get("output_mask", ())
    if len(mask) != len(result):
        return result
    return tuple(r for r, asked in zip(result, mask, strict=True) if asked)


def _fits(call: Call, device: torch.device) -> bool:
    """Is there room for the operands?  Where there is none, the table's figure has to do."""
    needed = call.operand_bytes()
    return needed < 64 << 20 or 3 * needed < free_memory(device)


def device_at_hand() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- The table on disk --------------------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("FXMEM_CACHE_DIR") or Path.home() / ".cache" / "fxmem")


def cache_path(device: torch.device, what: str = "workspaces") -> Path:
    """The file of what was measured on this device, with this torch version and thread count.

    The meta device runs nothing, so it goes by the file of the device at hand.
    """
    device = device_at_hand() if device.type == "meta" else device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    kind = f"{name}-{torch.__version__}-{torch.get_num_threads()}".replace(" ", "_")
    return cache_folder() / f"{what}-{kind}.json"


_Stamp = tuple[int, int, int]

_read: dict[Path, tuple[_Stamp, dict[str, Entry]]] = {}
"""What each file held when it was last read or written: tens of thousands of entries take a second."""


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def load_workspaces(device: torch.device) -> Workspaces:
    """The table on disk; an unreadable file counts as empty, since it can be measured again."""
    path = cache_path(device)
    try:
        stamp = _stamp(path)
        before, known = _read.get(path, (None, {}))
        if stamp != before:
            known = {
                str(k): Entry(int(n), int(operands), tuple(map(tuple, strides)), tuple(storages))
                for k, (n, operands, strides, storages) in json.loads(path.read_text()).items()
            }
            _read[path] = stamp, known
        return Workspaces(known, len(known))
    except (OSError, ValueError, AttributeError, TypeError):
        return Workspaces()


def save_workspaces(workspaces: Workspaces, device: torch.device) -> None:
    if len(workspaces.table) == workspaces.on_disk:
        return
    path = cache_path(device)
    table = {k: [e.nbytes, e.operands, e.strides, e.storages] for k, e in workspaces.table.items()}
    stamp = save_table(table, path)
    if stamp is not None:
        _read[path] = stamp, dict(workspaces.table)


def save_table(table: dict[str, Any], path: Path) -> _Stamp | None:
    """Write what was measured in one step, so that a reader never sees half of it.

    Returns the stamp of the file, or None where there is no room for one.
    """
    text = json.dumps(table, separators=(",", ":"), sort_keys=True)  # thrice as fast as ``dump``
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        stamp = _stamp(Path(file.name))
        os.replace(file.name, path)
    except OSError:
        return None  # a read-only home: the figures are measured again next time
    return stamp
