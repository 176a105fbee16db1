"""Hooks on modules: those of one model, and those of all modules that there are."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.utils.module_tracker import ModuleTracker

GLOBAL_FORWARD_HOOKS = (_global_forward_pre_hooks, _global_forward_hooks)

_TABLE = re.compile(r"model(\._modules\['[^']*'\])*\.\w+_hooks\w*")


def is_empty_hook_table(guard: Any) -> bool:
    """Does a guard of Dynamo's ask whether a table of hooks, of ``model`` or a submodule of it, is empty?

    One that was reached some other way may be no submodule at the next call.
    """
    is_table = guard.guard_type == "EMPTY_NN_MODULE_HOOKS_DICT"
    return is_table and _TABLE.fullmatch(guard.name) is not None


def has_hooks(module: nn.Module) -> bool:
    """Is there a hook on it or on one of its submodules?

    Asked at each call, so that no more is looked at than needed.
    """
    seen: set[int] = set()
    stack = [module]
    while stack:
        own = stack.pop().__dict__
        if id(own) in seen:
            continue
        seen.add(id(own))
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return True
        stack += [child for child in own["_modules"].values() if child is not None]
    return False


def hooks_of_all_modules() -> tuple[int, ...]:
    """Global hooks by identity, which Dynamo does not guard; but for those of trackers."""
    tables = (*GLOBAL_FORWARD_HOOKS, _global_backward_hooks, _global_backward_pre_hooks)
    return tuple(id(hook) for table in tables for hook in table.values() if not is_tracker(hook))


def is_tracker(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)
