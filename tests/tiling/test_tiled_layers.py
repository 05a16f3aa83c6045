"""Tiled layers by hand, against the layers that they stand for.

A matrix product of a block of rows has the bits of those rows of the whole product only if BLAS takes the same kernel
for both. With MKL and oneDNN it does where the whole and the blocks are multiples of 16 rows (as blocks of the strategy
are, where 16 rows fit the limit); at the edge of other sizes, and for single rows of an input, it takes others.

Bounds for sums in another order: a sum of n products whose factors are exact differs from the true one by at most
``n * u * sum |a_i b_i|`` to first order, whatever its order, with the unit roundoff ``u`` of the arithmetic. So two
orders differ by twice that. A product of bfloat16 matrices adds up in float32 and rounds once at the end, and every
partial sum is rounded to bfloat16: ``k`` parts give ``k`` roundings and ``k - 1`` additions, at most ``2 k u`` of the
sum of absolute values, against one rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lightning_zinf
from lightning_zinf import TiledEmbedding, TiledLinear, TiledMLP
from lightning_zinf.tiling import ops
from lightning_zinf.tiling.blocks import Views
from lightning_zinf.tiling.grid import Grid

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SHAPES = [((7,), 33, 130), ((4, 8), 96, 384), ((1,), 512, 1024)]
"""Shape of a batch, inputs, outputs: also such that no block is a multiple of a vector."""


def round_blocks(size: int, splits: int) -> bool:
    """Whether a dimension is cut into multiples of 16."""
    return splits == 1 or (size % 16 == 0 and -(-size // splits) % 16 == 0)


def results(layer: nn.Module, x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(torch.ones_like(out) if seed is None else seed)
    assert x.grad is not None
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return out.detach(), {"input": x.grad, **{n: g.clone() for n, g in grads.items()}}


def bound(terms: int, absolute: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    exact = 2 * terms * UNIT[torch.float32] * absolute
    return exact if dtype == torch.float32 else exact + (2 * parts + 1) * UNIT[dtype] * absolute


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("splits", [(1, 2), (3, 1), (2, 7)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_linear(dtype: torch.dtype, shape: Any, splits: tuple[int, int], bias: bool) -> None:
    batch, inputs, outputs = shape
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias, dtype=dtype)
    x, seed = torch.randn(*batch, inputs, dtype=dtype), torch.randn(*batch, outputs, dtype=dtype)
    tiled = TiledLinear.from_linear(plain, *splits)
    assert tiled.weight is plain.weight
    assert tiled.bias is plain.bias
    expected, grads = results(plain, x, seed)
    found, ours = results(tiled, x, seed)
    same_kernels = round_blocks(inputs, splits[0]) and round_blocks(outputs, splits[1])
    if splits[0] == 1 and same_kernels:
        assert torch.equal(found, expected)
    else:
        absolute = x.abs().float() @ plain.weight.detach().abs().float().t()
        absolute = absolute if plain.bias is None else absolute + plain.bias.detach().abs().float()
        error = (found.float() - expected.float()).abs()
        assert (error <= bound(inputs + 1, absolute, dtype, splits[0])).all()
    if splits[1] == 1 and same_kernels:
        assert torch.equal(ours["input"], grads["input"])
    else:
        absolute = seed.abs().float() @ plain.weight.detach().abs().float()
        error = (ours["input"].float() - grads["input"].float()).abs()
        assert (error <= bound(outputs, absolute, dtype, splits[1])).all()
    if bias:
        assert torch.equal(ours["bias"], grads["bias"])
    if same_kernels:
        assert torch.equal(ours["weight"], grads["weight"])
    else:
        rows = x.shape[:-1].numel()
        absolute = seed.reshape(rows, -1).abs().float().t() @ x.reshape(rows, -1).abs().float()
        error = (ours["weight"].float() - grads["weight"].float()).abs()
        assert (error <= bound(rows, absolute, dtype, 1)).all()


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(list(UNIT)),
    batch=st.integers(1, 70),
    inputs=st.integers(1, 200),
    blocks=st.integers(2, 20),
    step=st.integers(1, 10),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_blocks_of_16_rows_have_the_same_bits(
    dtype: torch.dtype, batch: int, inputs: int, blocks: int, step: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    outputs = 16 * blocks
    plain = nn.Linear(inputs, outputs, bias, dtype=dtype)
    x, out_grad = torch.randn(batch, inputs, dtype=dtype), torch.randn(batch, outputs, dtype=dtype)
    expected, grads = results(plain, x, out_grad)
    weight = Views(plain.weight, Grid.build(outputs, inputs, 16 * step, inputs))
    plain.zero_grad()
    found = ops.linear(x, weight, plain.bias) if step < blocks else plain(x)
    found.backward(out_grad)
    assert torch.equal(found, expected)
    for name, param in plain.named_parameters():
        assert param.grad is not None
        assert torch.equal(param.grad, grads[name]), name


def test_linear_from_outside() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 8)
    torch.manual_seed(0)
    tiled = TiledLinear(6, 8, in_splits=2, out_splits=3)
    assert list(tiled.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tiled.parameters(), plain.parameters(), strict=True))
    assert tiled.weight.shape == (8, 6)
    assert "in_splits=2, out_splits=3" in repr(tiled)
    tiled.load_state_dict(plain.state_dict())
    again = copy.deepcopy(tiled)
    x = torch.randn(2, 6)
    assert torch.equal(again(x), tiled(x))


def test_splits_are_checked() -> None:
    with pytest.raises(ValueError, match="out_splits must be a whole number of at least 1, got 0"):
        TiledLinear(2, 2, out_splits=0)
    with pytest.raises(ValueError, match=r"TiledEmbedding knows no sparse: use nn\.Embedding"):
        TiledEmbedding(4, 2, splits=2, sparse=True)


def test_linear_checkpointed_and_under_autocast() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(32, 96), torch.randn(4, 32)
    tiled = TiledLinear.from_linear(plain, 1, 3)
    for layer in (lambda x: checkpoint(tiled, x, use_reentrant=False), tiled):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            assert torch.equal(layer(x), plain(x))
            first = torch.autograd.grad(layer(x).float().square().sum(), list(plain.parameters()))
            second = torch.autograd.grad(plain(x).float().square().sum(), list(plain.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    tiled = TiledLinear(5, 7, in_splits=2, out_splits=3, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(tiled, {"weight": weight, "bias": bias}, (x,)).tanh()

    inputs = (x, tiled.weight.detach().requires_grad_(), tiled.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("splits", [1, 5, 50])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_embedding(dtype: torch.dtype, splits: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(50, 6, dtype=dtype, **options)
    torch.manual_seed(0)
    tiled = TiledEmbedding(50, 6, splits, dtype=dtype, **options)
    assert torch.equal(tiled.weight, plain.weight)
    for ids in (torch.randint(0, 50, (4, 9)), torch.tensor([3, 3, 3, 49]), torch.tensor(7), torch.empty(0, dtype=int)):
        tiled.zero_grad()
        plain.zero_grad()
        found, expected = tiled(ids), plain(ids)
        assert found.shape == expected.shape
        assert torch.equal(found, expected)
        seed = torch.randn_like(expected)
        found.backward(seed)
        expected.backward(seed)
        assert torch.equal(tiled.weight.grad, plain.weight.grad)  # type: ignore[arg-type]
        with torch.no_grad():
            assert torch.equal(tiled(ids), plain(ids))
    with pytest.raises(IndexError):
        tiled(torch.tensor([50]))


class MLP(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.most = max(self.most, x.size(1))
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


@pytest.mark.parametrize("tile", [1, 3, 4, 64])
def test_mlp_over_the_sequence(tile: int) -> None:
    torch.manual_seed(0)
    mlp = MLP().double()
    tiled = TiledMLP(mlp, tile)
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    expected, grads = results(mlp, x)
    mlp.most = 0
    found, ours = results(tiled, x)
    assert mlp.most == min(tile, 10)
    # Sums over 20 tokens of numbers below 100: far more than their rounding in float64, far less than a mistake.
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    for name, grad in grads.items():
        assert torch.allclose(ours[name if name == "input" else f"module.{name}"], grad, rtol=0, atol=1e-10), name
    with torch.no_grad():
        assert torch.allclose(tiled(x), expected, rtol=0, atol=1e-12)


def test_mlp_keeps_one_tile_of_what_is_inside() -> None:
    mlp = MLP()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        TiledMLP(mlp, 2)(torch.randn(2, 10, 16, requires_grad=True))
    assert max(saved, default=0) < 2 * 10 * 64  # the hidden layer of the whole sequence


def test_they_are_where_they_are_said_to_be() -> None:
    for name in ("TiledLinear", "TiledEmbedding", "TiledMLP", "tiled_linear_cross_entropy", "TilingConfig"):
        assert name in lightning_zinf.__all__
        assert getattr(lightning_zinf, name).__name__ == name


def test_what_is_computed_is_bounded_by_a_tile() -> None:
    """Beside the result and the gradients there is nothing of more elements than one block's weight or result."""
    tokens, inputs, outputs, splits = 48, 32, 256, 8
    tiled, x = TiledLinear(inputs, outputs, out_splits=splits), torch.randn(tokens, inputs, requires_grad=True)
    made: dict[str, list[torch.Size]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view:
                made.setdefault(func.overloadpacket.__name__, []).append(out.shape)
            return out

    with Watch():
        out = tiled(x)
        out.sum().backward()
    block = torch.Size((tokens, outputs // splits))
    weight = torch.Size((outputs // splits, inputs))
    assert made["addmm"] == [block] * splits
    assert sorted(made["mm"]) == sorted([weight, x.shape] * splits)
    assert made["empty"].count(out.shape) == 1
    most = max(block.numel(), weight.numel(), x.numel())
    large = {name for name, shapes in made.items() if any(shape.numel() > most for shape in shapes)}
    assert large == {"empty", "cat"}  # the result, and the gradient of the weight, which is whole without the strategy
