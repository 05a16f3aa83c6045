"""What benchmarks share that train each case in a process of its own."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _gpu_profile import StepOnGpu

if TYPE_CHECKING:
    import torch


def peak_rss(*, reset: bool = False) -> int:
    """Return this process's peak resident bytes; with ``reset``, forget the peak first and return the present size."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if reset else "VmHWM"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def run_case(name: str, command: Sequence[str]) -> dict[str, Any]:
    """Run a case in a process of its own; return what it printed last, as JSON. Exits if the case failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"\n{name} failed with exit status {done.returncode}:\n{done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def gpt(args: Namespace) -> torch.nn.Module:
    """Build the GPT of examples/gpt that the options describe, always with the same weights."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))
    from model import GPT

    torch.manual_seed(0)
    with quick_init() if args.quick_init else contextlib.nullcontext():
        return GPT(args.vocab, args.seq, args.hidden, args.layers, max(1, args.hidden // 64))


@contextlib.contextmanager
def quick_init() -> Iterator[None]:
    """Let random numbers of weights be one pattern repeated, at the speed of memory."""
    import torch

    # On the CPU, also where a strategy has modules made on the accelerator.
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), device="cpu") * 0.02

    def fill(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        with torch.no_grad():
            for part in self.view(-1).split(pattern.numel()):
                part.copy_(pattern[: part.numel()])
        return self

    kept = {name: getattr(torch.Tensor, name) for name in ("normal_", "uniform_")}
    try:
        for name in kept:
            setattr(torch.Tensor, name, fill)
        yield
    finally:
        for name, method in kept.items():
            setattr(torch.Tensor, name, method)


def tokens(args: Namespace) -> torch.Tensor:
    """Return the tokens of all steps, (steps * batch, seq + 1), the same for every case."""
    import torch

    count = args.steps + args.warmup + 1
    generator = torch.Generator().manual_seed(0)
    return torch.randint(args.vocab, (count * args.batch, args.seq + 1), generator=generator)


def train(args: Namespace, step: Callable[[torch.Tensor], Any]) -> dict[str, float]:
    """Take all steps; return their median time and the bytes that this process moved from and to disks in each.

    With ``--profile`` one more step follows, which tells what the GPU does.
    """
    import torch

    data = tokens(args)
    times: list[float] = []
    moved = (0, 0)
    for number in range(args.steps + args.warmup):
        batch = data[number * args.batch : (number + 1) * args.batch].to(args.device)
        if number == args.warmup:
            moved = disk_bytes()
        start = time.perf_counter()
        step(batch)
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    read, written = (b - a for a, b in zip(moved, disk_bytes(), strict=True))
    report = {"step": statistics.median(times[args.warmup :])}
    report |= {"nvme_read_bytes": read / args.steps, "nvme_write_bytes": written / args.steps}
    if args.profile:
        batch = data[-args.batch :].to(args.device)
        watch = StepOnGpu()
        step(batch)
        report |= watch.report()
    return report


def disk_bytes(process: int | str = "self") -> tuple[int, int]:
    """Return the bytes that a process has read from and written to disks."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def device_peak(args: Namespace) -> int:
    """Return the most bytes that tensors took on the accelerator; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
