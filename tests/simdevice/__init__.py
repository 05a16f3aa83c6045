"""A simulated accelerator, ``torch.device("sim")``: memory of its own, streams, events, and copies that take time.

What it computes has the bits of the CPU. What a missing wait would do on a GPU it does here, and says so: see the notes
in ``stream.h`` and ``memory.h``. It has to be registered before the first backward of a process, since autograd counts
devices then; and a process that has it is no longer like others. So tests that use it run in a process of their own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from simdevice import device
from simdevice.accelerator import register_accelerator

NAME = "sim"
_library: list[Any] = []  # what is registered stays for as long as this does


def register() -> torch.device:
    """Make the device known to torch, once, and return it."""
    if not _library:
        device.load()
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, sys.modules["simdevice.device"])
        torch.utils.generate_methods_for_privateuse1_backend()
        _register_in_python()
        register_accelerator()
    return torch.device(NAME, 0)


def start(seed: int, compute: int, copy: int) -> None:
    """Forget what was found to be wrong, and delay each job by up to so many microseconds from here on."""
    device.set_delays(0)
    device.reports()
    device.set_delays(seed, compute, copy)


def finish() -> None:
    """Delay no more, and fail if an operator or a copy saw other bytes than the order of the program promises."""
    device.set_delays(0)
    found = device.reports()
    assert not found, "\n".join(found)


def _register_in_python() -> None:
    """Operators that compute on the CPU as they do for it, and autocast as it is for the CPU."""
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("dropout", _dropout, "AutogradPrivateUse1")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lower(name: str) -> None:
        function = getattr(torch.ops.aten, name).default

        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(NAME)
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                cast = [_cast(a, dtype) for a in args]
                return function(*cast, **{k: _cast(v, dtype) for k, v in kwargs.items()})

        aten.impl(name, kernel, "AutocastPrivateUse1")

    for name in ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "conv2d", "scaled_dot_product_attention"):
        lower(name)
    _library.append(aten)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    known = isinstance(value, Tensor) and value.device.type == NAME and value.dtype in (torch.float32, torch.bfloat16)
    return value.to(dtype) if known else value


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """Dropout as torch has it on a CPU; for other devices it is one kernel, which rounds in another order."""
    if p == 0 or not train or x.numel() == 0:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
