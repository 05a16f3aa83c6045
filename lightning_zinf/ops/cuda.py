"""Adam on planes in the memory of a CUDA device: one pass over it, with the bits of the kernels for host memory.

Note [Bits on a device]
~~~~~~~~~~~~~~~~~~~~~~~
A compiler for CUDA fuses multiplications and additions as it likes. So every operation below names its rounding, which
forbids that, and the formula is that of ``ops/kernels/isa_impl.inc`` line by line. It is compiled when it is first used
on a device, by ``torch.cuda._compile_kernel``, which newer versions of torch have; and before anything is updated by
it, its results on random planes are compared with the reference's, bit by bit. Where that fails, updates on the device
run as the reference does, in some fifty passes of plain torch, after one warning.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_zinf.ops import reference
from lightning_zinf.ops.reference import AdamHyper, Segment

SOURCE = """
__device__ __forceinline__ float zinf_nan(float x) { return x == x ? x : __int_as_float(0x7fc00000); }

extern "C" __global__ void zinf_adam(void *weight, short *residual, float *exp_avg, float *exp_avg_sq, const void *grad,
                                     int numel, int split, int wide, int scale_bits, int clip_bits, int decay_bits,
                                     int l2_bits, int one_minus_beta1_bits, int beta2_bits, int one_minus_beta2_bits,
                                     int bias2_sqrt_bits, int eps_bits, int neg_step_size_bits) {
  const float scale = __int_as_float(scale_bits), clip = __int_as_float(clip_bits), decay = __int_as_float(decay_bits);
  const float l2 = __int_as_float(l2_bits), w = __int_as_float(one_minus_beta1_bits);
  const float beta2 = __int_as_float(beta2_bits), one_minus_beta2 = __int_as_float(one_minus_beta2_bits);
  const float bias2_sqrt = __int_as_float(bias2_sqrt_bits), eps = __int_as_float(eps_bits);
  const float neg_step_size = __int_as_float(neg_step_size_bits);
  const bool far = !(w < 0.5f && w > -0.5f);
  const float coeff = far ? __fsub_rn(w, 1.0f) : w;
  const long long stride = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < numel; i += stride) {
    float g = wide ? ((const float *)grad)[i] : __uint_as_float((unsigned)((const unsigned short *)grad)[i] << 16);
    const unsigned high = split ? (unsigned)((const unsigned short *)weight)[i] << 16 : 0;
    float p = split ? __uint_as_float(high + (unsigned)(int)residual[i]) : ((const float *)weight)[i];
    float m = exp_avg[i], v = exp_avg_sq[i];
    g = __fmul_rn(g, scale);
    g = clip < g ? clip : g;
    g = -clip > g ? -clip : g;
    if (l2 != 0.0f)
      g = __fmaf_rn(l2, p, g);
    else
      p = __fmul_rn(p, decay);
    m = zinf_nan(__fmaf_rn(coeff, __fsub_rn(g, m), far ? g : m));
    v = zinf_nan(__fmaf_rn(__fmul_rn(one_minus_beta2, g), g, __fmul_rn(v, beta2)));
    const float denom = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), bias2_sqrt), eps);
    p = zinf_nan(__fadd_rn(p, __fdiv_rn(__fmul_rn(neg_step_size, m), denom)));
    exp_avg[i] = m, exp_avg_sq[i] = v;
    if (split) {
      const unsigned master = __float_as_uint(p);
      ((unsigned short *)weight)[i] = (unsigned short)((master + 0x8000u) >> 16);
      residual[i] = (short)(unsigned short)master;
    } else {
      ((float *)weight)[i] = p;
    }
  }
}
"""
_THREADS, _BLOCKS = 256, 4096
_LONGEST = 1 << 30
"""Elements of a launch: the kernel counts them in 32 bits."""

Launch = Callable[[list[Any], int], None]


def adam_update(
    weight: Tensor,
    residual: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    segments: Sequence[Segment],
    hypers: Sequence[AdamHyper],
    *,
    grad_scale: float = 1.0,
    clip_value: float | None = None,
) -> None:
    """See :func:`lightning_zinf.ops.adam_update`; planes and gradients on one accelerator, arguments unchecked."""
    launch = launcher(weight.device) if weight.is_cuda else None
    if launch is None:
        reference.adam_update(
            weight, residual, exp_avg, exp_avg_sq, segments, hypers, grad_scale=grad_scale, clip_value=clip_value
        )
        return
    run(launch, weight, residual, exp_avg, exp_avg_sq, segments, hypers, grad_scale, clip_value)


def run(
    launch: Launch,
    weight: Tensor,
    residual: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    segments: Sequence[Segment],
    hypers: Sequence[AdamHyper],
    grad_scale: float,
    clip_value: float | None,
) -> None:
    """Update every segment by the kernel.

    Args:
        launch: Runs the kernel with a list of its arguments, over so many elements.
        weight: And the rest as in :func:`adam_update`.
    """
    rows = [[*struct.unpack("<10i", reference.adam_scalars(h, grad_scale, clip_value).tobytes())] for h in hypers]
    for segment in segments:
        grad = segment.grad.detach().reshape(-1)
        for first in range(0, grad.numel(), _LONGEST):
            part = grad[first : first + _LONGEST]
            at = slice(segment.offset + first, segment.offset + first + part.numel())
            planes = [p.detach().view(-1)[at] for p in (weight, weight if residual is None else residual)]
            planes += [exp_avg.detach().view(-1)[at], exp_avg_sq.detach().view(-1)[at], part]
            flags = [part.numel(), int(residual is not None), int(part.dtype == torch.float32)]
            launch([*planes, *flags, *rows[segment.hyper]], part.numel())


@functools.cache
def launcher(device: torch.device) -> Launch | None:
    """Return what runs the kernel on a device; None, after a warning, if it cannot be had or gives other bits."""
    try:
        with torch.cuda.device(device), _compiler():
            kernel = torch.cuda._compile_kernel(SOURCE, "zinf_adam")  # type: ignore[attr-defined,unused-ignore]
    except (AttributeError, OSError, RuntimeError, ImportError) as error:
        _warn(f"the kernel for it could not be compiled ({type(error).__name__}: {error})")
        return None

    def launch(arguments: list[Any], numel: int) -> None:
        blocks = min(_BLOCKS, -(-numel // _THREADS))
        with torch.cuda.device(device):
            kernel(grid=(blocks, 1, 1), block=(_THREADS, 1, 1), args=arguments)

    try:
        wrong = differs(launch, device)
    except (TypeError, RuntimeError, ValueError) as error:
        wrong = f"it could not be run ({type(error).__name__}: {error})"
    if wrong:
        _warn(f"the kernel for it was tried, and {wrong}")
        return None
    return launch


@contextmanager
def _compiler() -> Iterator[None]:
    """Have torch find NVRTC where its own packages have it, and not insist on a toolkit, of which nothing is used."""
    from torch.utils import cpp_extension  # takes a while to import

    nvidia = importlib.util.find_spec("nvidia")
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    for folder in () if nvidia is None else nvidia.submodule_search_locations or ():
        for path in sorted(Path(folder).glob(f"*/lib/{name}")):
            ctypes.CDLL(str(path))  # what is loaded is found by its name from then on
    before = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = before or str(Path(torch.__file__).parent)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


_TRIED = 5000
"""Elements that the kernel is tried on, of every magnitude there is."""


def differs(launch: Launch, device: torch.device) -> str:
    """Try the kernel on random planes; return in what it differs from the reference, or nothing."""
    draw = torch.Generator().manual_seed(0)
    for split, dtype, decoupled in itertools.product((True, False), (torch.float32, torch.bfloat16), (True, False)):
        planes, grad = _planes(draw, split=split, dtype=dtype)
        hypers = [AdamHyper(1e-3, 0.9 if decoupled else 0.1, 0.999, 1e-8, 0.1, 3, decoupled)]
        results = []
        for ours in (True, False):
            own = {name: None if plane is None else plane.to(device, copy=True) for name, plane in planes.items()}
            segments = [Segment(8, grad[8:].to(device), 0), Segment(0, grad[:7].to(device), 0)]
            if ours:
                run(launch, **own, segments=segments, hypers=hypers, grad_scale=0.37, clip_value=1e3)  # type: ignore[arg-type]
            else:
                reference.adam_update(**own, segments=segments, hypers=hypers, grad_scale=0.37, clip_value=1e3)  # type: ignore[arg-type]
            results.append(own)
        for name, found in results[0].items():
            expected = results[1][name]
            if found is not None and not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):  # type: ignore[union-attr]
                return f"{name} differs from the reference's (split {split}, {dtype}, decoupled {decoupled})"
    return ""


def _planes(draw: torch.Generator, *, split: bool, dtype: torch.dtype) -> tuple[dict[str, Tensor | None], Tensor]:
    """Return random planes by the names of arguments, and a gradient."""
    scales = torch.logspace(-30, 8, _TRIED)
    weight = torch.randn(_TRIED, generator=draw)
    low = torch.randint(-(2**15), 2**15, (_TRIED,), generator=draw).to(torch.int16)
    grad = (torch.randn(_TRIED, generator=draw) * scales).to(dtype)
    grad[:2] = torch.tensor([float("nan"), float("inf")])
    planes = {
        "weight": weight.bfloat16() if split else weight,
        "residual": low if split else None,
        "exp_avg": torch.randn(_TRIED, generator=draw) * scales,
        "exp_avg_sq": (torch.randn(_TRIED, generator=draw) * scales).square(),
    }
    return planes, grad


def _warn(why: str) -> None:
    warnings.warn(
        f"updates of optimizer state on the accelerator run in plain torch, many times slower: {why}. Results are the "
        "same. offload_optimizer='cpu' may be faster",
        UserWarning,
        stacklevel=5,
    )
