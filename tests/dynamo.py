"""Dynamo as a test wants to find it."""

import contextlib

import torch

from fxmem import backend


@contextlib.contextmanager
def fresh_dynamo():
    """Nothing is compiled yet, the backend has its name, and the generator's state comes back."""
    if "fxmem" not in torch._dynamo.list_backends(()):  # a checkout that is not installed
        torch._dynamo.register_backend(backend.fxmem, name="fxmem")
    torch._dynamo.reset()
    with torch.random.fork_rng(devices=[]):
        yield
    torch._dynamo.reset()
