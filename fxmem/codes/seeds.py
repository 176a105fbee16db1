"""The step's seed: what codes are rounded by, drawn from the generator that ``torch.manual_seed`` seeds.

It is drawn from a copy, so that the step's own random operators draw what they draw without codes; once
the forward has ended, the generator itself takes the same draw, so that the next step has another seed.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("fxmem", "FRAGMENT")


def _step_seed(like: torch.Tensor) -> torch.Tensor:
    copy = torch.Generator()
    copy.set_state(torch.default_generator.get_state())
    return torch.empty((), dtype=torch.int64).random_(generator=copy)


def _fake_step_seed(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty((), dtype=torch.int64, device="cpu")


def next_step() -> None:
    """Let the next step have another seed."""
    torch.empty((), dtype=torch.int64).random_()


_LIBRARY.define("step_seed(Tensor like) -> Tensor")
_LIBRARY.impl("step_seed", _step_seed, "CompositeExplicitAutograd")
torch.library.register_fake("fxmem::step_seed", _fake_step_seed, lib=_LIBRARY)

step_seed = torch.ops.fxmem.step_seed.default
"""An int64 from a copy of the CPU's generator; the argument says for which kind of tensors."""
