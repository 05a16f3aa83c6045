"""What a GPU does in one step, by torch.profiler: how long kernels run, and what is copied over the link."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class StepOnGpu:
    """Watches the GPU from its making until :meth:`report`."""

    def __init__(self) -> None:
        import torch

        torch.cuda.synchronize()
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.start()
        self._begin = time.perf_counter()

    def report(self) -> dict[str, float]:
        """Return ``gpu_idle`` (share of the time without a kernel), ``h2d_bytes`` and ``d2h_bytes``.

        Where the profiler fails, which is said on stderr, they are NaN: the steps have been timed without it.
        """
        import torch

        torch.cuda.synchronize()
        seconds = time.perf_counter() - self._begin
        try:
            self._profile.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                self._profile.export_chrome_trace(str(path))
                return summary(json.loads(path.read_text())["traceEvents"], seconds)
        except (RuntimeError, OSError, LookupError, ValueError) as error:
            print(f"the profiler failed: {type(error).__name__}: {error}", file=sys.stderr)
            return dict.fromkeys(("gpu_idle", "h2d_bytes", "d2h_bytes"), float("nan"))


def summary(events: Iterable[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Sum up the events of a trace.

    Args:
        events: What torch.profiler exports: ``cat``, ``name``, ``ts`` and ``dur`` in microseconds, ``args``.
        seconds: How long it was recorded.
    """
    kernels: list[tuple[float, float]] = []
    moved = {"HtoD": 0.0, "DtoH": 0.0}
    for event in events:
        if event.get("cat") == "kernel":
            kernels.append((event["ts"], event["ts"] + event["dur"]))
        elif event.get("cat") == "gpu_memcpy":
            for way in moved:
                moved[way] += event["args"]["bytes"] if way in event["name"] else 0
    if not kernels:
        raise LookupError("the trace has no kernels")
    busy, reached = 0.0, float("-inf")
    for begin, end in sorted(kernels):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return {"gpu_idle": 1 - busy / 1e6 / seconds, "h2d_bytes": moved["HtoD"], "d2h_bytes": moved["DtoH"]}
