"""Settings of every test."""

from __future__ import annotations

import torch

# Two cores at most are there for sure, and files and kernels have threads of their own.
torch.set_num_threads(1)
