"""Settings of a whole test run."""

import logging

import torch  # noqa: F401  whose loggers are set up now

# pytest listens to loggers that do not propagate, and where anybody listens to this one, torch prints each
# graph that it compiles, for every pass.  It has no handlers now, so it says nothing.
logging.getLogger("torch.__trace").propagate = True
