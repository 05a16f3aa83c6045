"""The way of activations between an accelerator with memory of its own and the host.

Note [Streams of activations]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Copies in either direction run on streams of their own, so that they overlap with compute and with each other. A copy
to the host starts when the kernels that were queued before it have finished; it keeps its source until it is done,
since the source may be freed or changed meanwhile. A copy to the device goes to fresh memory of the compute stream,
so it too waits for what was queued there before (the memory may have been freed by it). Compute waits for it when it is
about to use what comes (``arrive``), not before: what is copied ahead comes while it computes something else.

On a CPU, and on devices without streams, the copies are done when the call returns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_zinf.memory.streams import module_of
from lightning_zinf.monitor.counters import Counters


@dataclass
class Copy:
    """A copy on a stream; keeps both ends alive until it is waited for."""

    event: Any
    keep: tuple[Tensor, ...] = field(repr=False)
    nbytes: int

    def wait(self, timeout: float | None = None) -> int:
        """Block until the copy is done."""
        self.event.synchronize()
        self.keep = ()
        return self.nbytes

    def done(self) -> bool:
        """Whether the copy is done."""
        return bool(self.event.query())


class DeviceLink:
    """Copies bytes from and to a device.

    Args:
        device: The accelerator, or the CPU playing one.
        counters: Where bytes are counted.
    """

    def __init__(self, device: torch.device, counters: Counters) -> None:
        self._device = device
        self._counters = counters
        self._module = module_of(device)
        self._down_stream = None if self._module is None else self._module.Stream(device)
        self._up_stream = None if self._module is None else self._module.Stream(device)

    def down(self, source: Tensor, host: Tensor) -> Copy | None:
        """Copy bytes to host memory; return the copy if it is not done yet."""
        self._counters.device_to_host_bytes += source.nbytes
        trace = self._counters.trace
        if trace is None:
            return self._down(source, host)
        return trace.request("d2h", "activations", source.nbytes, functools.partial(self._down, source, host))

    def _down(self, source: Tensor, host: Tensor) -> Copy | None:
        if self._module is None or self._down_stream is None:
            host.copy_(source)
            return None
        self._down_stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._down_stream):
            host.copy_(source, non_blocking=True)
            done = self._module.Event()
            done.record(self._down_stream)
        source.record_stream(self._down_stream)
        return Copy(done, (source, host), source.nbytes)

    def up(self, host: Tensor) -> tuple[Tensor, Copy | None]:
        """Copy bytes to fresh memory on the device; return it, and the copy if it is not done.

        Whoever uses that memory has to have the copy :meth:`arrive` first.
        """
        self._counters.host_to_device_bytes += host.nbytes
        target = torch.empty(host.numel(), dtype=torch.uint8, device=self._device)
        trace = self._counters.trace
        submit = functools.partial(self._up, host, target)
        return target, submit() if trace is None else trace.request("h2d", "activations", host.nbytes, submit)

    def _up(self, host: Tensor, target: Tensor) -> Copy | None:
        if self._module is None or self._up_stream is None:
            target.copy_(host)
            return None
        compute = self._module.current_stream(self._device)
        self._up_stream.wait_stream(compute)
        with self._module.stream(self._up_stream):
            target.copy_(host, non_blocking=True)
            done = self._module.Event()
            done.record(self._up_stream)
        target.record_stream(self._up_stream)
        return Copy(done, (host,), host.nbytes)

    def arrive(self, copy: Copy) -> None:
        """Have what is computed from here on wait for a copy to the device."""
        assert self._module is not None, "on a CPU a copy is done when the call returns"
        self._module.current_stream(self._device).wait_event(copy.event)
