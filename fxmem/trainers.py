"""Callbacks that put a budget on a training loop of transformers or of Lightning.

Both compile the model in place (``model.compile(backend="fxmem")``) when training begins, after the
library has wrapped it, so that checkpoints keep their keys, and take that back when it ends.  Both keep
room for what the loop holds beside the step.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxmem import _torch, backend
from fxmem.basics.budget import read_reserve
from fxmem.basics.errors import FxmemError

# Not by its name: a checkout that is not installed has no entry point.
_BACKEND: Any = backend.fxmem


def transformers_callback(budget: Any, **options: Any) -> Any:
    """A callback for the Trainer of transformers: ``Trainer(..., callbacks=[it])``.

    budget, options: as the backend takes them.  reserve: without it, the optimizer's state, and while
    gradients are accumulated their bytes, are kept free.  ``fxmem.plans(model)`` gives the plans.
    Raises ``FxmemError`` when training begins with activation checkpointing or torch_compile on.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            _refuse_checkpointing(model, args)
            if args.torch_compile:
                raise FxmemError(
                    "torch_compile=True compiles the model that fxmem's callback compiles\n"
                    "  try: TrainingArguments without torch_compile and torch_compile_backend"
                )
            accumulates = args.gradient_accumulation_steps > 1
            _compile(model, budget, options, [kwargs.get("optimizer")], accumulates)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _take_back(kwargs["model"])

    return Callback()


def _refuse_checkpointing(model: nn.Module, args: Any) -> None:
    # The argument was renamed to activation_checkpointing in version 5 of transformers.
    asked = any(
        getattr(args, name, False)
        for name in ("gradient_checkpointing", "activation_checkpointing")
    )
    on = asked or any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if on:
        raise FxmemError(
            "activation checkpointing is on, which decides what to run again before fxmem can: whole "
            "blocks, whatever the budget leaves room for\n"
            "  try: TrainingArguments without gradient_checkpointing (activation_checkpointing), or "
            "model.gradient_checkpointing_disable()"
        )


def lightning_callback(budget: Any, module: str = "", **options: Any) -> Any:
    """A callback for Lightning: ``Trainer(..., callbacks=[it])``.

    module: the name of the submodule that ``training_step`` calls, such as ``"model"``; without it, the
    LightningModule's own ``forward``.  budget, options, reserve: as for transformers.
    Raises ``FxmemError`` after two batches in which nothing called that module.
    """
    try:
        pytorch: Any = importlib.import_module("lightning.pytorch")
    except ImportError:
        pytorch = importlib.import_module("pytorch_lightning")  # its older name

    class Callback(pytorch.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            accumulates = trainer.accumulate_grad_batches > 1
            model = pl_module.get_submodule(module)
            _compile(model, budget, options, trainer.optimizers, accumulates)

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 2:  # by then a model in several graphs is planned, too
                _check_called(pl_module, module)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            _take_back(pl_module.get_submodule(module))

    return Callback()


def _check_called(pl_module: nn.Module, module: str) -> None:
    try:
        backend.plans(pl_module.get_submodule(module))
    except FxmemError:
        called = f"self.{module}(...)" if module else "self(...)"
        raise FxmemError(
            f"two batches were trained, and no step of {called} was planned: training_step calls "
            "another module, or a method of it\n"
            '  try: fxmem.trainers.lightning_callback(budget, module="name of what it calls")'
        ) from None


# -- What both do --------------------------------------------------------------------------------------


def _compile(
    model: nn.Module,
    budget: Any,
    options: dict[str, Any],
    optimizers: Iterable[Any],
    accumulates: bool,
) -> None:
    given = {"budget": budget, "reserve": _beside(model, optimizers, accumulates), **options}
    backend.read(given)  # a wrong option is an error now, not after the first batch was loaded
    call: Any = torch.compile(_torch.inlined(model._call_impl), backend=_BACKEND, options=given)
    model._compiled_call_impl = call  # as model.compile does, which leaves out torch's own modules


def _beside(model: nn.Module, optimizers: Iterable[Any], accumulates: bool) -> int:
    """Bytes that a training loop holds beside its steps: optimizers' state, gradients that are there."""
    # Wrappers such as accelerate's hold the optimizer that they were made of.
    bare = [getattr(o, "optimizer", o) for o in optimizers]
    states = sum(read_reserve(o).nbytes for o in bare if isinstance(o, torch.optim.Optimizer))
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return states + (gradients if accumulates else 0)


def _take_back(model: nn.Module) -> None:
    """The model as it was before ``model.compile``."""
    model._compiled_call_impl = None
