"""The kernel for CUDA, compiled for the host with intrinsics that round as CUDA's do, has the bits of the others."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_zinf.ops import cuda

_INTRINSICS = """
#include <cmath>
#include <cstring>
#define __global__
#define __device__
#define __forceinline__ inline
struct Index { unsigned x; };
static const Index gridDim{1}, blockDim{1}, blockIdx{0}, threadIdx{0};
template <class To, class From> To bits(From from) { To to; std::memcpy(&to, &from, sizeof(to)); return to; }
inline float __int_as_float(int x) { return bits<float>(x); }
inline float __uint_as_float(unsigned x) { return bits<float>(x); }
inline unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
"""


def _compiled(folder: Path, source: str) -> cuda.Launch:
    (folder / "kernel.cpp").write_text(_INTRINSICS + source)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "kernel.cpp", "-o", "kernel.so"], cwd=folder, check=True)
    kernel = ctypes.CDLL(str(folder / "kernel.so")).zinf_adam

    def launch(arguments: list[Any], numel: int) -> None:
        kernel(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in arguments))

    return launch


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_kernel_has_the_bits_of_the_reference(tmp_path: Path) -> None:
    assert cuda.differs(_compiled(tmp_path, cuda.SOURCE), torch.device("cpu")) == ""
    fused = cuda.SOURCE.replace(
        "__fadd_rn(p, __fdiv_rn(__fmul_rn(neg_step_size, m), denom))", "__fmaf_rn(neg_step_size, m / denom, p)"
    )
    (tmp_path / "fused").mkdir()
    found = cuda.differs(_compiled(tmp_path / "fused", fused), torch.device("cpu"))  # the comparison is one
    assert "differs from the reference's" in found


def test_without_a_compiler_the_reference_is_used_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("CUDA_HOME environment variable is not set")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", fails, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    cuda.launcher.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"could not be compiled \(OSError: CUDA_HOME"):
            assert cuda.launcher(torch.device("cpu")) is None
    finally:
        cuda.launcher.cache_clear()
