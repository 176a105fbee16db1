"""Settings of a whole test run."""

import gc
import logging
from collections.abc import Iterator

import pytest
import torch  # noqa: F401  whose loggers are set up now

# pytest listens to loggers that do not propagate, and where anybody listens to this one, torch prints each
# graph that it compiles, for every pass.  It has no handlers now, so it says nothing.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="module", autouse=True)
def _of_this_file() -> Iterator[None]:
    """Garbage is looked for among what this file's tests made.

    Steps are measured after a collection, which takes seconds where a million objects are left of earlier
    files: graphs, guards, kernels.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
