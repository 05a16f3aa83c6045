"""The compute kernels in plain torch: their definition, the oracle of the tests, and the slow fallback.

Note. ``adam_update``, ``split_master`` and ``join_master`` give the bits of the compiled kernels. Each line of the Adam
formula rounds where ``torch.optim.Adam`` and ``AdamW`` (``foreach=False``, ``fused=False``, float32, on a CPU with
fma) round. Two operations are not left to the backend. A fused multiply-add is emulated in float64, where the product
of two float32 is exact: the sum is rounded to odd, after which rounding to float32 is correct. The square root goes
through float64 for the correctly rounded result, which the vector math library of torch's x86 builds does not give.
And what is divided by is a tensor, since torch's CUDA kernel multiplies by the reciprocal of a number.
``squared_norm`` sums in another order than the kernel and differs from it in the last bits.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_SLICE = 1 << 20  # elements whose float64 temporaries are alive at a time
_CRC_POLYNOMIAL = 0xEDB88320  # zlib's


@dataclass(frozen=True, slots=True)
class AdamHyper:
    """Hyper-parameters of one parameter group at one step.

    Args:
        lr: Learning rate.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to the denominator.
        weight_decay: Weight decay; 0 for none.
        step: Number of this update, counted from 1.
        decoupled: AdamW (the weight shrinks by ``lr * weight_decay``) if true, else Adam (L2: the decay is added to
            the gradient).
        maximize: Ascend instead of descend.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool = True
    maximize: bool = False


@dataclass(slots=True)
class Segment:
    """A run of ``grad.numel()`` elements of the planes that shares a gradient tensor and hyper-parameters.

    Args:
        offset: First element of the run in the planes.
        grad: Its gradient: contiguous, float32 or bfloat16, any shape. Not modified.
        hyper: Index into the table of hyper-parameters.
    """

    offset: int
    grad: torch.Tensor
    hyper: int


def adam_scalars(hyper: AdamHyper, grad_scale: float, clip_value: float | None) -> array[float]:
    """The scalars of one update, computed in double as ``torch.optim`` does and rounded once to float32.

    Returns:
        Ten float32 in the order of the extension's ``AdamScalars``: gradient factor, clip, decay factor, L2 factor,
        1 - beta1, beta2, 1 - beta2, sqrt(bias correction 2), eps, -step size.

    Raises:
        ValueError: ``step`` is below 1, or ``clip_value`` is not positive.
    """
    h = hyper
    if h.step < 1:
        raise ValueError(f"AdamHyper.step counts from 1, got {h.step}")
    if clip_value is None:
        clip_value = float("inf")
    elif not clip_value > 0:
        raise ValueError(f"clip_value must be positive or None, got {clip_value}")
    bias1 = 1 - h.beta1**h.step
    bias2 = 1 - h.beta2**h.step
    return array(
        "f",
        (
            -grad_scale if h.maximize else grad_scale,
            clip_value,
            1 - h.lr * h.weight_decay if h.decoupled else 1.0,
            0.0 if h.decoupled else h.weight_decay,
            1 - h.beta1,
            h.beta2,
            1 - h.beta2,
            bias2**0.5,
            h.eps,
            -(h.lr / bias1),
        ),
    )


def adam_update(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Sequence[Segment],
    hypers: Sequence[AdamHyper],
    *,
    grad_scale: float = 1.0,
    clip_value: float | None = None,
) -> None:
    """See :func:`lightning_zinf.ops.adam_update`; any device with float64, arguments unchecked."""
    rows = [adam_scalars(hyper, grad_scale, clip_value) for hyper in hypers]
    with torch.no_grad():
        planes = [
            None if plane is None else plane.detach().view(-1) for plane in (weight, residual, exp_avg, exp_avg_sq)
        ]
        for segment in segments:
            grad = segment.grad.detach().reshape(-1)
            for first in range(0, grad.numel(), _SLICE):
                g = grad[first : first + _SLICE].float()
                at = segment.offset + first
                w, r, m, v = (None if plane is None else plane[at : at + g.numel()] for plane in planes)
                assert w is not None and m is not None and v is not None  # noqa: PT018
                p = w if r is None else _join(w, r)
                _adam(p, m, v, g, rows[segment.hyper])
                if r is not None:
                    _split(p, w, r)


def _adam(p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, g: torch.Tensor, row: array[float]) -> None:
    """One update of float32 tensors of one shape; p, m and v in place."""
    scale, clip, decay, l2, one_minus_beta1, beta2, one_minus_beta2, bias2_sqrt, eps, neg_step_size = row
    g = (g * scale).clamp(-clip, clip)
    if l2 != 0:
        g = _fma(l2, p, g)
    p.mul_(decay)
    # torch.lerp starts from the nearer end, and takes the weight's distance to it in float32.
    if abs(one_minus_beta1) < 0.5:
        m.copy_(_fma(one_minus_beta1, g - m, m))
    else:
        m.copy_(_fma(array("f", (one_minus_beta1 - 1,))[0], g - m, g))
    v.copy_(_fma(g * one_minus_beta2, g, v * beta2))
    denom = v.double().sqrt().float().div_(torch.full_like(v, bias2_sqrt)).add_(eps)
    p.add_((m * neg_step_size).div_(denom))
    for plane in (p, m, v):
        plane.masked_fill_(plane.isnan(), float("nan"))


def _fma(a: torch.Tensor | float, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """A correctly rounded float32 ``a * b + c``; see the note at the top."""
    product = b.double() * (a if isinstance(a, float) else a.double())
    addend = c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    away = error.sign() * total.sign()
    step = torch.where(((bits & 1) == 0) & (error.abs() > 0), away, 0.0).long()
    return (bits + step).view(torch.float64).float()


def squared_norm(tensors: Sequence[torch.Tensor]) -> tuple[float, bool]:
    """See :func:`lightning_zinf.ops.squared_norm`."""
    total = sum(squared_norms(tensors))
    return total, total - total == 0


def squared_norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    """See :func:`lightning_zinf.ops.squared_norms`."""
    sums = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        slices = (flat[first : first + _SLICE] for first in range(0, flat.numel(), _SLICE))
        sums.append(sum((float(part.double().square().sum()) for part in slices), 0.0))
    return sums


def split_master(master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """See :func:`lightning_zinf.ops.split_master`."""
    _split(master.detach().view(-1), weight.detach().view(-1), residual.detach().view(-1))


def join_master(weight: torch.Tensor, residual: torch.Tensor, master: torch.Tensor) -> None:
    """See :func:`lightning_zinf.ops.join_master`."""
    master.detach().view(-1).copy_(_join(weight.detach().view(-1), residual.detach().view(-1)))


def _split(master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    bits = master.view(torch.int32).long()
    # Casting to int16 keeps the low 16 bits.
    weight.view(torch.int16).copy_(((bits + 0x8000) >> 16).to(torch.int16))
    residual.copy_(bits.to(torch.int16))


def _join(weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    bits = (weight.view(torch.int16).long() << 16) + residual.long()
    return bits.to(torch.int32).view(torch.float32)


def crc32(content: bytes | bytearray | memoryview | torch.Tensor, crc: int) -> int:
    """See :func:`lightning_zinf.ops.crc32`."""
    if isinstance(content, torch.Tensor):
        return zlib.crc32(memoryview(content.detach().reshape(-1).view(torch.uint8).numpy()), crc)  # type: ignore[arg-type,unused-ignore]
    return zlib.crc32(content, crc)


def crc32_combine(first: int, second: int, nbytes: int) -> int:
    """See :func:`lightning_zinf.ops.crc32_combine`.

    A CRC is a polynomial over GF(2) modulo a fixed one, bit 31 its lowest power: appending ``nbytes`` bytes multiplies
    it by ``x ** (8 * nbytes)``. The inversions at both ends cancel out.
    """
    power, square, exponent = 1 << 31, 1 << 30, 8 * nbytes
    while exponent:
        if exponent & 1:
            power = _product(power, square)
        square = _product(square, square)
        exponent >>= 1
    return _product(first, power) ^ second


def _product(a: int, b: int) -> int:
    """Return the product of two polynomials modulo the CRC's."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_CRC_POLYNOMIAL if b & 1 else 0)
    return result
