"""Optimizer states and gradients for the kernels' tests."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lightning_zinf.ops import kernels, reference
from lightning_zinf.ops.kernels import AdamHyper

needs_extension = pytest.mark.skipif(not kernels.AVAILABLE, reason="the extension is not built")
HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=3)
ISAS = kernels._ext.isa_names() if kernels.AVAILABLE else []


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def spread(generator: torch.Generator, numel: int, width: float = 4.0) -> torch.Tensor:
    """Normal values times log-normal magnitudes."""
    return torch.randn(numel, generator=generator) * torch.exp(width * torch.randn(numel, generator=generator))


def any_bits(generator: torch.Generator, numel: int) -> torch.Tensor:
    """Every kind of float: subnormal, huge, infinite, NaN."""
    return torch.randint(-(1 << 31), 1 << 31, (numel,), generator=generator).to(torch.int32).view(torch.float32)


@dataclass
class State:
    weight: torch.Tensor
    residual: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @classmethod
    def random(cls, generator: torch.Generator, numel: int, split: bool) -> State:
        master = spread(generator, numel, 2)
        weight, residual = master, None
        if split:
            weight, residual = torch.empty(numel, dtype=torch.bfloat16), torch.empty(numel, dtype=torch.int16)
            reference.split_master(master, weight, residual)
        return cls(weight, residual, spread(generator, numel), spread(generator, numel).square())

    def planes(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        return self.weight, self.residual, self.exp_avg, self.exp_avg_sq

    def clone(self) -> State:
        return State(*(plane if plane is None else plane.clone() for plane in self.planes()))

    def master(self) -> torch.Tensor:
        if self.residual is None:
            return self.weight
        master = torch.empty(self.weight.numel())
        reference.join_master(self.weight, self.residual, master)
        return master

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, State)
        pairs = zip(self.planes(), other.planes(), strict=True)
        return all((a is None and b is None) or same_bits(a, b) for a, b in pairs)
