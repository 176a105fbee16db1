"""Tests run in two workers, on as few as two cores: each computes in one thread."""

import torch

torch.set_num_threads(1)
