"""Settings of every test."""

from __future__ import annotations

import hypothesis
import torch

# How long an example takes says nothing on machines that others use too.
hypothesis.settings.register_profile("ours", deadline=None)
hypothesis.settings.load_profile("ours")

# Two cores at most are there for sure, and files and kernels have threads of their own.
torch.set_num_threads(1)
