"""Cross entropy in tiles, against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_zinf import tiled_linear_cross_entropy

CLASSES, WIDTH = 23, 5


def data(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 4, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(CLASSES, WIDTH, dtype=dtype, requires_grad=True)
    target = torch.randint(0, CLASSES, (3, 4))
    target[0, :2] = -100
    return x, weight, torch.randn(CLASSES, dtype=dtype, requires_grad=True) if bias else None, target


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    logits = F.linear(x, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), target.flatten(), **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("classes", "tokens"), [(5, 3), (1, 1), (100, 100)])
def test_as_torch(classes: int, tokens: int, bias: bool, reduction: Any, smoothing: float) -> None:
    x, weight, b, target = data(bias)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    expected = plain(x, weight, b, target, **options)
    found = tiled_linear_cross_entropy(x, weight, target, b, classes=classes, tokens=tokens, **options)
    inputs = [x, weight] if b is None else [x, weight, b]
    seed = torch.randn_like(expected)
    # Sums of some dozen numbers below 100 in float64.
    assert torch.allclose(found.flatten(), expected.flatten(), rtol=0, atol=1e-12)
    theirs = torch.autograd.grad(expected, inputs, seed)
    ours = torch.autograd.grad(found, inputs, seed.view(found.shape))
    for a, e in zip(ours, theirs, strict=True):
        assert torch.allclose(a, e, rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    x, weight, bias, target = data(True)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return tiled_linear_cross_entropy(
            x, weight, target, bias, classes=6, tokens=5, ignore_index=3, label_smoothing=0.1
        )

    target.clamp_(min=0)
    assert torch.autograd.gradcheck(loss, (x, weight, bias))


def test_low_precision_is_near_float64() -> None:
    """Each logit is rounded to bfloat16, and is below 16: by up to 2^-4, and so are log-sum-exp and the target's."""
    x, weight, bias, target = data(True, torch.bfloat16)
    found = tiled_linear_cross_entropy(x, weight, target, bias, classes=6, tokens=5)
    assert bias is not None
    expected = plain(x.double(), weight.double(), bias.double(), target)
    assert found.dtype == torch.float32
    assert abs(float(found.detach()) - float(expected.detach())) <= 2 * 2**-4
    found.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_never_all_of_the_logits() -> None:
    """The largest tensor that forward or backward makes is a tile of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    x = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(512, 4, requires_grad=True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        tiled_linear_cross_entropy(x, weight, torch.arange(64), classes=128, tokens=16).backward()
    assert largest == 128 * 16  # beside which there are the weight and its gradient, which have as many


def test_all_ignored() -> None:
    x, weight, _, target = data(False)
    ignored = torch.full_like(target, -100)
    assert torch.isnan(tiled_linear_cross_entropy(x, weight, ignored))
    assert tiled_linear_cross_entropy(x, weight, ignored, reduction="sum").item() == 0


def test_refusals() -> None:
    x, weight, _, target = data(False)
    with pytest.raises(ValueError, match=r"do not go together: expected \(\*, features\)"):
        tiled_linear_cross_entropy(x, weight.t(), target)
    with pytest.raises(ValueError, match="classes that are not from 0 to 22"):
        tiled_linear_cross_entropy(x, weight, target.clamp(min=CLASSES))
    with pytest.raises(ValueError, match="reduction must be"):
        tiled_linear_cross_entropy(x, weight, target, reduction="max")  # type: ignore[arg-type]
