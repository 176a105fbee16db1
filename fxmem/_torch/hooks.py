"""Hooks on modules: those of one model, and those of all modules that there are."""

from __future__ import annotations

from collections.abc import Iterator
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

_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hook_tables(module: nn.Module) -> Iterator[dict[int, Any]]:
    """The module's own hooks, one table for each kind."""
    return (getattr(module, name) for name in _TABLES)


def has_hooks(module: nn.Module) -> bool:
    """Is there a hook on it or on one of its submodules?

    Asked at each call, when nothing of this is in the processor's caches: no more is looked at than needed.
    """
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return True
    return any(has_hooks(child) for child in own["_modules"].values() if child is not None)


def hooks_of_all_modules() -> tuple[int, ...]:
    """Global hooks by identity, which Dynamo does not guard; but for those of trackers."""
    tables = (*GLOBAL_FORWARD_HOOKS, _global_backward_hooks, _global_backward_pre_hooks)
    return tuple(id(hook) for table in tables for hook in table.values() if not is_tracker(hook))


def is_tracker(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)
