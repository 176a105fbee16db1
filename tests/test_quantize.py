"""Lossy codes: who reads what, the pass as text, the noise that is predicted, and what a plan promises."""

# ruff: noqa: E501 (a node is one line of text, however long)

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_passes import captured, changed, tensor
from test_schedule import FLOWS  # noqa: F401  (same walks)
from torch import nn

import fxmem
from fxmem.allotment import Allotment
from fxmem.consumers import Use, saved_values
from fxmem.lossy import LOSSY
from fxmem.passes.quantize import Code, QuantizePass
from fxmem.passes.recompute import Recompute, RecomputePass
from fxmem.passes.uncode import UncodePass

ALLOW = ("recompute", "lossless", "quantize")
INT4 = next(e for e in LOSSY if e.name.startswith("int4"))


# -- Who reads what ------------------------------------------------------------------------------------
