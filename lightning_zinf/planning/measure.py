"""The speeds of this machine's links and processors, measured in less than a minute.

Every figure is the median of short runs, so that one slow moment of a shared machine does not decide it. The kernel of
the optimizer and the disk are measured through the same code that training uses.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zinf import ops
from lightning_zinf.config import IOConfig
from lightning_zinf.memory.nvme import Extent, NvmeStore
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops.memory import host_empty

MIB = 2**20
Progress = Callable[[str], None]


def measure_machine(
    folders: str | Path | Sequence[str], *, seconds: float = 1.5, say: Progress = lambda _: None
) -> dict[str, float]:
    """Measure everything that this machine has.

    Args:
        folders: The folder on the disk that training would use, or several over which state would be striped.
        seconds: Time for each figure, about.
        say: Told the name of each part before it starts.

    Returns:
        Rates by the names of :class:`lightning_zinf.memory.planner.Rates`, and ``flops_bf16`` and ``flops_fp32`` for
        its ``flops``, in bytes or operations a second.

    Raises:
        OSError: If the folder cannot be used.
    """
    found: dict[str, float] = {}
    say("disk")  # first: a folder that cannot be used is said at once
    disk = disk_rates(folders, seconds)
    say("optimizer kernel")
    found["adam"] = adam_rate(seconds)
    say("host memory")
    found["host_copy"] = copy_rate(seconds)
    for name, dtype in (("flops_bf16", torch.bfloat16), ("flops_fp32", torch.float32)):
        say(f"compute in {str(dtype).removeprefix('torch.')}")
        found[name] = compute_rate(dtype, seconds)
    if torch.cuda.is_available():
        say("host to accelerator and back")
        found["host_to_device"], found["device_to_host"] = link_rates(seconds)
    say("all-gather of two processes")
    found["gather"] = gather_rate(seconds)
    return found | disk


def _rate(amount: float, action: Callable[[], Any], seconds: float) -> float:
    """Return how much of ``amount`` is done in a second: the median over repetitions, after one to warm up."""
    action()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return amount / statistics.median(times)


def adam_rate(seconds: float, numel: int = 2**23) -> float:
    """Return the bytes a second that the kernel reads and writes, in mixed precision: 26 a parameter."""
    weight, residual = torch.zeros(numel, dtype=torch.bfloat16), torch.zeros(numel, dtype=torch.int16)
    first, second = torch.zeros(numel), torch.zeros(numel)
    grad = torch.full((numel,), 1e-3, dtype=torch.bfloat16)
    hyper = ops.AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1, decoupled=True)
    ops.set_num_threads(torch.get_num_threads())

    def update() -> None:
        ops.adam_update(weight, residual, first, second, [ops.Segment(0, grad, 0)], [hyper])

    return _rate(26.0 * numel, update, seconds)


def copy_rate(seconds: float, nbytes: int = 128 * MIB) -> float:
    """Return the bytes a second that a copy in host memory moves, counted once."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
    return _rate(nbytes, lambda: target.copy_(source), seconds)


class _Block(nn.Module):
    """A transformer block of a usual shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return out


def compute_rate(dtype: torch.dtype, seconds: float, width: int = 512, batch: int = 4, seq: int = 128) -> float:
    """Return the operations a second of a transformer block, forward and backward, on the accelerator."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        width, batch, seq = 2048, 8, 1024
    block = _Block(width).to(device, dtype)
    x = torch.randn(batch, seq, width, device=device, dtype=dtype, requires_grad=True)
    weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    operations = 3 * batch * seq * (2.0 * weights + 4.0 * seq * width)

    def step() -> None:
        block(x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return _rate(operations, step, seconds)


def link_rates(seconds: float, nbytes: int = 256 * MIB) -> tuple[float, float]:
    """Return the bytes a second from pinned host memory to the accelerator, and back."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def up() -> None:
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    def down() -> None:
        host.copy_(device, non_blocking=True)
        torch.cuda.synchronize()

    return _rate(nbytes, up, seconds), _rate(nbytes, down, seconds)


# ---------------------------------------------------------------------- all-gather


def gather_rate(seconds: float, nbytes: int = 32 * MIB) -> float:
    """Return the bytes a second of whole buffers that two processes of this machine gather over gloo."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        results = torch.multiprocessing.get_context("spawn").SimpleQueue()
        spawn(_gather, args=(f"file://{folder}/meet", nbytes, seconds, results), nprocs=2, join=True)
        return float(results.get())


def _gather(rank: int, meet: str, nbytes: int, seconds: float, results: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    whole, shard = torch.empty(nbytes, dtype=torch.uint8), torch.ones(nbytes // 2, dtype=torch.uint8)
    times = []
    begin, go = time.perf_counter(), True
    while go:
        start = time.perf_counter()
        dist.all_gather(list(whole.chunk(2)), shard)
        times.append(time.perf_counter() - start)
        flag = torch.tensor([time.perf_counter() - begin < seconds])
        dist.broadcast(flag, 0)  # both have to stop after the same round
        go = bool(flag)
    if rank == 0:
        results.put(nbytes / statistics.median(times[1:] or times))
    dist.destroy_process_group()


# ---------------------------------------------------------------------- disk


def disk_rates(
    folders: str | Path | Sequence[str], seconds: float, size: int = 256 * MIB, request: int = 16 * MIB
) -> dict[str, float]:
    """Return the bytes a second of reading, of writing, and of both at once, past the page cache.

    Raises:
        OSError: If a folder cannot be used.
    """
    found = {}
    with closing(NvmeStore(folders, IOConfig(), Counters())) as store:
        store.reserve(2 * size)
        first, second = (_written(store, size) for _ in range(2))
        for name, operations in (("nvme_read", "r"), ("nvme_write", "w"), ("nvme_mixed", "rw")):
            work = list(zip(operations, (first, second), strict=False))
            found[name] = _stream(store, work, request, seconds)
    return found


def _written(store: NvmeStore, size: int) -> Extent:
    """Return an extent with content: what was only allocated would be read without the drive."""
    data, extent = host_empty(min(16 * MIB, size)), store.allocate(size)
    data.random_(0, 255)
    for offset in range(0, size, data.nbytes):
        store.write(extent, data, offset).wait()
    for file in extent.volume.files:
        file.fsync()
    return extent


def _stream(store: NvmeStore, work: Sequence[tuple[str, Extent]], request: int, seconds: float) -> float:
    """Return the bytes a second of going over extents again and again, each in a thread with three requests ahead."""
    moved = [0.0] * len(work)

    def run(index: int) -> None:
        operation, extent = work[index]
        buffers = [host_empty(request).fill_(1) for _ in range(3)]
        start = store.read if operation == "r" else store.write
        tickets: list[Any] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            if len(tickets) >= len(buffers):
                tickets[-len(buffers)].wait()
            number = len(tickets)
            at = number % (extent.nbytes // request) * request
            tickets.append(start(extent, buffers[number % len(buffers)], at))
        moved[index] = sum(t.wait() for t in tickets) / (time.perf_counter() - begin)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(moved):
        raise OSError("the disk could not be measured: a transfer failed")
    return sum(moved)
