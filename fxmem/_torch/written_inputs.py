"""Private functions of torch with which a step's code writes what it changes, such as running statistics.

before                                       after
  new, y, ... = forward(old, x, ...)           y, ... = forward(old, x, ...)   # and old is new
  old.copy_(new)   # AOTAutograd, in Python

AOTAutograd hands what a graph makes of its inputs out, and copies it over them one by one: a network has
three for each batch normalization.  Here kernels write them, or all are written at once before the code
returns.

Run on torch 2.11.0, 2.13.0 and 2.15.0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

Code = Callable[[list[Any]], Any]


def written_by_code(exported: Any, num_inputs: int) -> Mapping[int, int]:
    """Places of outputs that the forward's code is to write, and of the inputs that they are written over.

    AOTAutograd is told so: it takes a forward without these outputs from now on.
    """
    state, before = exported._aot_state, exported._aot_state.fw_metadata
    if exported._aot_graph_capture.maybe_subclass_meta is not None or before.tokens:
        return {}  # inputs come in other places there
    infos = [
        replace(info, keep_input_mutations=True) if _is_plainly_written(info) else info
        for info in before.input_info
    ]
    if len(infos) != num_inputs:
        return {}
    after = replace(before, input_info=infos)
    left = set(after.mutated_inp_runtime_indices)
    state.fw_metadata = after
    handed_out = enumerate(before.mutated_inp_runtime_indices)
    return {place: at for place, at in handed_out if at not in left}


def _is_plainly_written(info: Any) -> bool:
    """Are only its elements other ones in the end, and has it no part in gradients?"""
    moved = (
        info.mutates_metadata
        or info.mutates_storage_metadata
        or info.mutation_inductor_storage_resize
    )
    return info.mutates_data and not moved and not info.requires_grad


def without_outputs(forward: fx.GraphModule, places: Mapping[int, int]) -> fx.GraphModule:
    """The graph as AOTAutograd sees it."""
    found = copy.copy(forward)
    found.graph = copy.deepcopy(forward.graph)
    output = found.graph.output_node()
    returned: Any = output.args[0]
    output.args = (_without(returned, places),)
    if len(output.meta.get("desc", ())) == len(returned):
        output.meta["desc"] = _without(output.meta["desc"], places)
    return found


def _without(values: Any, places: Mapping[int, int]) -> tuple[Any, ...]:
    return tuple(value for place, value in enumerate(values) if place not in places)


def writing(code: Code, places: Mapping[int, int]) -> Code:
    """Code that returns all outputs as code that writes those.

    What it returns as None it has written itself.
    """

    def run(args: list[Any]) -> Any:
        inputs = [args[at] for at in places.values()]
        outputs = list(code(args))
        pairs = zip(inputs, map(outputs.__getitem__, places), strict=True)
        left = [(old, new) for old, new in pairs if new is not None]
        if left:
            torch._foreach_copy_([old for old, _ in left], [new for _, new in left])
        # Autograd, which looks away here, refuses a backward that saved what was there before.
        torch.autograd.graph.increment_version(inputs)
        return _without(outputs, places)

    return run
