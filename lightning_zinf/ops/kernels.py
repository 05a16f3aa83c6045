"""The compute kernels, typed: Adam on the planes of a shard, sums of squares, and the split master weight.

Note. This layer checks every argument, by name, and hands addresses to the compiled extension, which releases the GIL
and works on its own threads. Without the extension the same functions run in plain torch (``reference.py``), slowly,
after one warning. Results have the same bits for any number of threads and any instruction set.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from lightning_zinf.ops import reference
from lightning_zinf.ops.reference import AdamHyper, Segment

__all__ = [
    "AVAILABLE",
    "AdamHyper",
    "Segment",
    "adam_update",
    "isa",
    "join_master",
    "num_threads",
    "set_num_threads",
    "split_master",
    "squared_norm",
    "squared_norms",
]

_ext: Any = None
_reason = ""
try:
    _ext = importlib.import_module("lightning_zinf._ext")
except ImportError as error:
    _reason = str(error)

#: Whether the compiled extension was found.
AVAILABLE: bool = _ext is not None

# As in ops/kernels/isa.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


@functools.cache
def _warn_fallback() -> None:
    warnings.warn(
        f"lightning-zinf runs WITHOUT its compiled extension ({_reason}): the optimizer and the gradient norms use "
        "plain torch, many times slower, with more memory. Build it with a C++17 compiler: "
        "`pip install --force-reinstall --no-deps .` in a checkout.",
        UserWarning,
        stacklevel=3,
    )


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], numel: int | None) -> int:
    """The address of a tensor that the extension can take; an error that names it otherwise."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor in host memory, got {tensor.layout} on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")
    if numel is not None and tensor.numel() != numel:
        raise ValueError(f"{name} has {tensor.numel()} elements, expected {numel}")
    return tensor.data_ptr()


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
    """Update the segments of a shard with one step of Adam or AdamW, in one pass over memory, in place.

    For each element: the gradient is read as float32, multiplied by ``grad_scale``, clamped, and used as
    ``torch.optim.AdamW`` (or ``Adam``) would in float32, to the bit but for the square root, which is correctly
    rounded here. Non-finite gradients behave as in torch; a NaN is always written as the canonical one. Elements
    outside the segments are untouched.

    Args:
        weight: Master weights, float32, any shape; with ``residual``, their high halves, bfloat16.
        residual: Low halves of the master weights, int16, same number of elements; None for float32 weights.
        exp_avg: First moments, float32, same number of elements.
        exp_avg_sq: Second moments, float32, same number of elements.
        segments: What to update; segments must not overlap.
        hypers: Hyper-parameters, which segments refer to by index.
        grad_scale: Factor on every gradient, rounded to float32 (1 / loss scale, times the clip factor of the norm).
        clip_value: Clamp gradients to ``[-clip_value, clip_value]`` after scaling.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A tensor is not contiguous, not in host memory or of the wrong size; a segment is outside the
            planes, overlaps another or has no hyper-parameters; ``step < 1``; ``clip_value <= 0``. Nothing is changed.
    """
    weight_at = _check("weight", weight, torch.float32 if residual is None else torch.bfloat16, None)
    count = weight.numel()
    residual_at = 0 if residual is None else _check("residual", residual, torch.int16, count)
    exp_avg_at = _check("exp_avg", exp_avg, torch.float32, count)
    exp_avg_sq_at = _check("exp_avg_sq", exp_avg_sq, torch.float32, count)
    cells: list[int] = []
    for index, segment in enumerate(segments):
        grad = segment.grad
        code = _DTYPE_CODES.get(grad.dtype, -1)
        # The quick test first: a model has thousands of small segments.
        if code < 0 or not grad.is_cpu or not grad.is_contiguous() or grad.layout is not torch.strided:
            _check(f"segments[{index}].grad", grad, tuple(_DTYPE_CODES), None)
        cells += (segment.offset, grad.numel(), grad.data_ptr(), code, segment.hyper)
    table = array("q", cells)
    rows = array("f")
    for hyper in hypers:
        rows.extend(reference.adam_scalars(hyper, grad_scale, clip_value))
    if _ext is None:
        _warn_fallback()
        _check_segments(segments, len(hypers), count)
        reference.adam_update(
            weight, residual, exp_avg, exp_avg_sq, segments, hypers, grad_scale=grad_scale, clip_value=clip_value
        )
        return
    _ext.adam_update(
        weight_at,
        residual_at,
        exp_avg_at,
        exp_avg_sq_at,
        count,
        table.buffer_info()[0],
        len(segments),
        rows.buffer_info()[0],
        len(hypers),
    )


def _check_segments(segments: Sequence[Segment], num_hypers: int, count: int) -> None:
    """The checks that the extension makes itself."""
    end = 0
    for index, segment in sorted(enumerate(segments), key=lambda item: item[1].offset):
        numel = segment.grad.numel()
        if segment.offset < 0 or segment.offset + numel > count:
            raise ValueError(f"segment {index} is outside the planes of {count} elements")
        if not 0 <= segment.hyper < num_hypers:
            raise ValueError(f"segment {index} names row {segment.hyper} of {num_hypers} hyper-parameter rows")
        if numel and segment.offset < end:
            raise ValueError(f"segment {index} overlaps another")
        end = max(end, segment.offset + numel)


def squared_norm(tensors: Sequence[torch.Tensor]) -> tuple[float, bool]:
    """The sum of squares of all elements, and whether all are finite, in one pass.

    Args:
        tensors: Contiguous float32 or bfloat16 tensors in host memory, any shapes.

    Returns:
        The sum, accumulated in double in an order fixed by the tensors' sizes, and ``finite``. The sum is infinite or
        NaN if and only if some element is.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor is not contiguous or not in host memory.
    """
    if _ext is None:
        _warn_fallback()  # here too, so that the warning points at the caller
    total = sum(squared_norms(tensors), 0.0)
    return total, total - total == 0


def squared_norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The sum of squares of each tensor; as :func:`squared_norm`, whose sum is that of these in order."""
    table = array("q")
    for index, tensor in enumerate(tensors):
        address = _check(f"tensors[{index}]", tensor, tuple(_DTYPE_CODES), None)
        table.extend((address, tensor.numel(), _DTYPE_CODES[tensor.dtype]))
    if _ext is None:
        _warn_fallback()
        return reference.squared_norms(tensors)
    sums = array("d", bytes(8 * len(tensors)))
    _ext.squared_norms(table.buffer_info()[0], len(tensors), sums.buffer_info()[0])
    return sums.tolist()


def split_master(master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """Split float32 master weights into bfloat16 weights and int16 residuals, without loss.

    Args:
        master: float32, contiguous, any shape. Not modified.
        weight: bfloat16, as many elements; receives the master rounded half up (ties away from zero).
        residual: int16, as many elements; receives what :func:`join_master` needs to restore the master.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A tensor is not contiguous, not in host memory or of another size.
    """
    master_at = _check("master", master, torch.float32, None)
    count = master.numel()
    weight_at = _check("weight", weight, torch.bfloat16, count)
    residual_at = _check("residual", residual, torch.int16, count)
    if _ext is None:
        _warn_fallback()
        reference.split_master(master, weight, residual)
    else:
        _ext.split_master(master_at, weight_at, residual_at, count)


def join_master(weight: torch.Tensor, residual: torch.Tensor, master: torch.Tensor) -> None:
    """Restore float32 master weights from their halves, to the bit; the inverse of :func:`split_master`.

    Args:
        weight: bfloat16, contiguous, any shape. Not modified.
        residual: int16, as many elements. Not modified.
        master: float32, as many elements; receives the master weights.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A tensor is not contiguous, not in host memory or of another size.
    """
    weight_at = _check("weight", weight, torch.bfloat16, None)
    count = weight.numel()
    residual_at = _check("residual", residual, torch.int16, count)
    master_at = _check("master", master, torch.float32, count)
    if _ext is None:
        _warn_fallback()
        reference.join_master(weight, residual, master)
    else:
        _ext.join_master(weight_at, residual_at, master_at, count)


def set_num_threads(n: int) -> None:
    """Set how many threads, the calling one included, work on later calls. No effect on the plain torch fallback.

    Raises:
        ValueError: ``n < 1``.
    """
    if n < 1:
        raise ValueError(f"the number of threads must be at least 1, got {n}")
    if _ext is not None:
        _ext.set_num_threads(n)


def num_threads() -> int:
    """How many threads work on a call, the calling one included; torch's number for the plain torch fallback."""
    return torch.get_num_threads() if _ext is None else int(_ext.num_threads())


def isa() -> str:
    """The instruction set in use: ``base``, ``avx2`` or ``avx512``; ``reference`` for the plain torch fallback.

    The best one the CPU runs is chosen, or the one that ``ZINF_ISA`` names.

    Raises:
        RuntimeError: ``ZINF_ISA`` names one that this CPU does not run.
    """
    return "reference" if _ext is None else str(_ext.isa())
