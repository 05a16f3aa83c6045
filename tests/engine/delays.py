"""Random delays in every stage of an engine: what a slow disk, a busy link or a slow rank would do.

A request to a file is not only waited for longer: it is submitted late, by a thread, so that a read brings its bytes
and a write takes them long after the engine has asked for that. Whoever uses memory too early, gives it away too early,
or relies on the order of requests, gets other bits.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_zinf.comm.group import Reduction
from lightning_zinf.engine.engine import Engine
from lightning_zinf.optim.update import Update

SHORT, LONG = 0.004, 0.06
"""Seconds: about what a small unit takes, and about what a step takes."""


class Late:
    """A request that begins later than it was asked for, and keeps its tensor until it has been waited for."""

    def __init__(self, pool: ThreadPoolExecutor, delay: float, keep: Tensor, submit: Callable[[], Any]) -> None:
        self.keep: Tensor | None = keep
        self._submit: Callable[[], Any] | None = submit
        self._future: Future[int] = pool.submit(self._run, delay)

    def _run(self, delay: float) -> int:
        time.sleep(delay)
        assert self._submit is not None
        ticket = self._submit()
        return 0 if ticket is None else int(ticket.wait())

    def wait(self, timeout: float | None = None) -> int:
        """Block until it is done."""
        try:
            return self._future.result(timeout)
        finally:
            self.keep = self._submit = None

    def done(self) -> bool:
        """Whether it is done."""
        return self._future.done()


class Delays:
    """Delays by stage.

    Args:
        seed: Of the delays.

    Attributes:
        count: Number of delays by stage.
    """

    def __init__(self, seed: int) -> None:
        self.count: Counter[str] = Counter()
        self._noise = random.Random(seed)
        self._lock = threading.Lock()

    def draw(self, stage: str) -> float:
        """Return the next delay: often none, rarely a long one, and that only where it may outlast a step."""
        with self._lock:
            self.count[stage] += 1
            if stage == "nvme_write" and self._noise.random() < 0.2:
                return LONG
            return self._noise.choice((0.0, 0.0, SHORT * self._noise.random()))

    def sleep(self, stage: str) -> None:
        time.sleep(self.draw(stage))

    def before(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, delayed."""

        @functools.wraps(function)
        def delayed(*args: Any, **kwargs: Any) -> Any:
            self.sleep(stage)
            return function(*args, **kwargs)

        return delayed


@contextmanager
def delayed(engine: Engine, seed: int) -> Iterator[Delays]:
    """Delay every stage of an engine."""
    delays, context = Delays(seed), engine.context
    # More threads than there are requests under way: none waits for another to begin.
    with ExitStack() as stack, ThreadPoolExecutor(64) as pool:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        def late(stage: str, submit: Callable[..., Any]) -> Callable[..., Any]:
            def start(extent: Any, tensor: Tensor, offset: int = 0) -> Late:
                return Late(pool, delays.draw(stage), tensor, functools.partial(submit, extent, tensor, offset))

            return start

        activations = context.activations
        for store in (context._nvme, None if activations is None else activations.nvme):
            if store is not None:
                replace(store, "read", late("nvme_read", store.read))
                replace(store, "write", late("nvme_write", store.write))
        if activations is not None and activations._link is not None:
            link, copy_down = activations._link, activations._link._down

            def down(source: Tensor, host: Tensor) -> Late:
                torch.autograd.graph.increment_version(host)  # as a copy on a stream does when it is submitted
                return Late(pool, delays.draw("d2h"), source, functools.partial(copy_down, source, host.data))

            replace(link, "_down", down)
            replace(link, "_up", delays.before("h2d", link._up))
        original = context._download

        def download(device: Tensor, host: Tensor) -> Late:
            return Late(pool, delays.draw("d2h"), device, functools.partial(original, device, host))

        replace(context, "_download", download)
        replace(context, "_upload", delays.before("h2d", context._upload))
        if context.comm is not None:
            replace(context.comm, "all_gather", delays.before("all_gather", context.comm.all_gather))
            replace(context.comm, "reduce_scatter", delays.before("reduce_scatter", context.comm.reduce_scatter))
            replace(Reduction, "mean", delays.before("reduce_wait", Reduction.mean))
        for kind in _kinds(Update):
            if "update_record" in kind.__dict__:
                replace(kind, "update_record", delays.before("update", kind.update_record))
        handles = [h for m in engine.root.modules() for h in _slow_module(m, delays)]
        try:
            yield delays
        finally:
            for handle in handles:
                handle.remove()


def _kinds(kind: type) -> Iterator[type]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _kinds(sub)


def _slow_module(module: nn.Module, delays: Delays) -> list[Any]:
    """Delay the forward and the backward of a module."""

    def forward(*_: Any) -> None:
        delays.sleep("forward")

    def backward(*_: Any) -> None:
        delays.sleep("backward")

    if any(True for _ in module.children()):
        return []
    return [module.register_forward_hook(forward), module.register_full_backward_pre_hook(backward)]
