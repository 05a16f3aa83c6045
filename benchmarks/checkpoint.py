"""Checkpoints: saving, loading and consolidating beside torch.save and torch.distributed.checkpoint (one process).

Then saving while training goes on, beside ``torch.distributed.checkpoint.async_save``: how long the call takes, and how
much longer the steps after it take than others, until the checkpoint is complete.

    python benchmarks/checkpoint.py                      # 101M parameters in float32, 1.2 GB of weights and moments
    python benchmarks/checkpoint.py --hidden 512 --rounds 1
    python benchmarks/checkpoint.py --deepspeed ~/ds/bin/python   # DeepSpeed too, of another environment

Everything is written to one folder, by turns, and synced: torch.save and DCP leave that to the kernel, so a sync of the
file system follows them, inside of their time (for what is saved in the background, after it). What the round before
wrote is removed first, outside of the time. Beside them is what the disk does with as many bytes past the page cache,
from four requests at a time: written, which is what saving state in memory takes, and read and written, which is what
saving state on NVMe takes. Consolidation runs in a
process of its own; its memory is the peak of what is anonymous (RssAnon). DeepSpeed (ZeRO-3) has a process of its own;
its zero_to_fp32 writes the weights alone, so ours is measured with --weights-only too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from lightning_zinf.checkpoint.load import load_optimizer, load_weights
from lightning_zinf.checkpoint.save import placeholders, save
from lightning_zinf.checkpoint.source import Checkpoint, ShardedStateDict
from lightning_zinf.config import PartitionConfig
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.partition import partition
from lightning_zinf.ops import File, IOEngine, host_empty
from lightning_zinf.optim.binding import OptimizerBinding
from lightning_zinf.optim.state_dict import optimizer_rest

Ours = tuple[Engine, OptimizerBinding, torch.optim.Optimizer]
MEASURE = """
import sys, threading, time
import lightning_zinf.cli, lightning_zinf.checkpoint.consolidate
import lightning_zinf.checkpoint.convert, lightning_zinf.checkpoint.deepspeed
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
before, peak = anonymous(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
assert lightning_zinf.cli.main(sys.argv[1:]) == 0
print(time.perf_counter() - start, peak[0] - before)
"""


def model_of(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(args.hidden, args.hidden, bias=False) for _ in range(args.layers)])


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def synced(run: Callable[[], Any]) -> Callable[[], None]:
    def both() -> None:
        run()
        os.sync()

    return both


def trained(args: argparse.Namespace, folder: Path, tier: str) -> Ours:
    """Return an engine after one step, so that there are moments."""
    model = model_of(args)
    optimizer = torch.optim.AdamW(model.parameters())
    config = PartitionConfig(torch.device("cpu"), "32-true", tier, tier, (str(folder / "nvme"),))  # type: ignore[arg-type]
    engine = partition(model, config, list(model.parameters()))
    ours = engine, OptimizerBinding(optimizer, engine), optimizer
    step_ours(ours, args.hidden)
    engine.flush()
    return ours


def step_ours(ours: Ours, hidden: int) -> None:
    engine, _, optimizer = ours
    optimizer.zero_grad()
    with engine.frame("train") as outputs:
        outputs.append(engine.root(torch.randn(2, hidden)).square().mean())
    engine.before_backward()
    outputs[-1].backward()
    engine.after_backward()
    optimizer.step()


def save_ours(ours: Ours, path: Path, *, background: bool = False) -> None:
    engine, binding, _ = ours
    checkpoint = {"state_dict": placeholders(engine), "optimizer_states": [optimizer_rest(binding)]}
    save(engine, checkpoint, path, [binding.optimizer], {}, background=background)


def load_ours(ours: Ours, path: Path) -> None:
    engine, binding, _ = ours
    with Checkpoint(path) as source:
        load_weights(engine, ShardedStateDict(source))
        load_optimizer(binding, source, 0, source.trainer()["optimizer_states"][0])


def step_plain(model: nn.Module, optimizer: torch.optim.Optimizer, hidden: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(2, hidden)).square().mean().backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = [name for name, _ in model.named_parameters()]
    entries = {names[i]: entry for i, entry in optimizer.state_dict()["state"].items()}
    return {"model": model.state_dict(), "optimizer": entries}


def zinf(*arguments: str | Path) -> tuple[float, int]:
    """Run the command; return its seconds and its peak of memory."""
    return measured(sys.executable, "-c", MEASURE, *map(str, arguments))


def measured(*command: str) -> tuple[float, int]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), int(peak)


class DeepSpeed:
    """A process that saves with DeepSpeed when it is asked to.

    Args:
        args: The command line.
        folder: Where to save.
    """

    script = str(Path(__file__).with_name("checkpoint_deepspeed.py"))

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.python, self.folder = args.deepspeed, folder
        command = [self.python, self.script, "save", str(args.hidden), str(args.layers), str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().split()
        if not answer:
            raise RuntimeError(f"DeepSpeed did not start: {' '.join(command)} says why")
        self.version = answer[1]

    @classmethod
    def find(cls, args: argparse.Namespace, folder: Path) -> DeepSpeed | None:
        """Start it, or say why not."""
        looked = subprocess.run([args.deepspeed, "-c", "import deepspeed"], capture_output=True, text=True)
        if looked.returncode:
            reason = (looked.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(
                f"without DeepSpeed: {args.deepspeed} cannot import it ({reason}); --deepspeed names another Python\n"
            )
            return None
        return cls(args, folder)

    def save(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("save", file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def consolidate(self, out: Path) -> tuple[float, int]:
        return measured(self.python, self.script, "consolidate", str(self.folder), str(out))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps that are taken while a checkpoint is being saved")
    parser.add_argument("--deepspeed", default=sys.executable, metavar="PYTHON", help="a Python that has it (this one)")
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder here by default)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder or Path.cwd(), prefix="bench-checkpoint-"))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        report(args, folder)
    finally:
        dist.destroy_process_group()
        shutil.rmtree(folder)


def report(args: argparse.Namespace, folder: Path) -> None:
    model = model_of(args)
    optimizer = torch.optim.AdamW(model.parameters())
    step_plain(model, optimizer, args.hidden)
    state = state_of(model, optimizer)
    nbytes = 12 * args.hidden * args.hidden * args.layers
    size = f"{nbytes / 12e6:.0f}M parameters, {nbytes / 1e9:.2f} GB of weights and moments"
    print(f"{size}; {args.rounds} rounds, medians\n")
    ours = {tier: trained(args, folder / tier, tier) for tier in ("none", "nvme")}
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    peaks: dict[str, int] = {}

    def tool(name: str, found: tuple[float, int]) -> None:
        note(name, found[0])
        peaks[name] = max(peaks.get(name, 0), found[1])

    deepspeed = DeepSpeed.find(args, folder / "deepspeed")
    for _ in range(args.rounds):
        for old in ("torch.pt", "dcp", *(f"{tier}.ckpt" for tier in ours)):
            remove(folder / old)
        os.sync()
        note("save: write and fsync of as many bytes", timed(lambda: raw_write(folder / "raw", nbytes)))
        note("save: direct write of as many bytes", direct_write(folder / "direct", nbytes))
        note("save: direct read and write of as many bytes", direct_copy(folder / "direct", nbytes))
        note("save: torch.save", timed(synced(lambda: torch.save(state, folder / "torch.pt"))))
        note("save: DCP", timed(synced(lambda: dcp.save(state, checkpoint_id=folder / "dcp"))))
        for tier, kept in ours.items():
            note(f"save: zinf, state on {tier}", timed(partial(save_ours, kept, folder / f"{tier}.ckpt")))
        note("load: torch.load", timed(lambda: torch.load(folder / "torch.pt", weights_only=True)))
        note("load: DCP", timed(lambda: dcp.load(state, checkpoint_id=folder / "dcp")))
        for tier, kept in ours.items():
            note(f"load: zinf, state on {tier}", timed(partial(load_ours, kept, folder / f"{tier}.ckpt")))
        tool("consolidate: zinf, checksums first", zinf("consolidate", folder / "nvme.ckpt", folder / "one", "--force"))
        if deepspeed is not None:
            note(f"save: DeepSpeed {deepspeed.version}, ZeRO-3", deepspeed.save())
            weights = ("consolidate", folder / "nvme.ckpt", folder / "weights", "--force", "--weights-only")
            tool("consolidate: zinf, weights only", zinf(*weights))
            tool("consolidate: zero_to_fp32", deepspeed.consolidate(folder / "fp32"))
            foreign = ("--from", "deepspeed", "--trust-pickle")
            tool("convert: zinf, from DeepSpeed", zinf("convert", folder / "deepspeed", folder / "converted", *foreign))
            shutil.rmtree(folder / "converted")
            shutil.rmtree(folder / "fp32")
    if deepspeed is not None:
        deepspeed.close()
    base = statistics.median(times["save: torch.save"])
    print(f"{'':<46}{'s':>8}{'GB/s':>8}{'x torch.save':>14}")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:<46}{median:>8.2f}{nbytes / median / 1e9:>8.2f}{median / base:>14.2f}")
    print("\nanonymous memory at most (the budget of zinf is 256 MiB):")
    for name, peak in peaks.items():
        print(f"{name:<46}{peak / 2**20:>8.0f} MiB")
    report_background(args, folder, model, optimizer, ours)
    for engine, _, _ in ours.values():
        engine.context.close()


def report_background(
    args: argparse.Namespace, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ours: dict[str, Ours]
) -> None:
    """Save while training goes on, in turns, and tell what it costs training."""

    def begin_dcp() -> Callable[[], Any]:
        future: Any = dcp.async_save(state_of(model, optimizer), checkpoint_id=folder / "dcp-async")
        return lambda: future.result()

    def begin_ours(tier: str) -> Callable[[], Any]:
        save_ours(ours[tier], folder / f"{tier}.ckpt", background=True)
        saving = ours[tier][0].saving
        return lambda: ours[tier][0].saving is not None and saving is not None and saving.wait()

    cases: dict[str, tuple[Callable[[], Callable[[], Any]], Callable[[], None]]] = {
        "DCP async_save, plain model": (begin_dcp, partial(step_plain, model, optimizer, args.hidden))
    }
    for tier, kept in ours.items():
        cases[f"zinf, state on {tier}"] = (partial(begin_ours, tier), partial(step_ours, kept, args.hidden))
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (begin, step) in cases.items():
            step()
            alone = statistics.median(timed(step) for _ in range(args.steps))
            start = time.perf_counter()
            end = begin()
            call = time.perf_counter() - start
            steps = sum(timed(step) for _ in range(args.steps))
            end()
            whole = time.perf_counter() - start
            os.sync()
            found[name].append((call, steps - args.steps * alone, whole, alone))
    print(f"\nin the background, while {args.steps} steps are taken:\n")
    columns = {"first call s": 13, "call s": 9, "x DCP": 8, "more in the steps s": 21, "complete after s": 18}
    columns["step alone s"] = 14
    print(f"{'':<32}" + "".join(f"{column:>{width}}" for column, width in columns.items()))
    base = statistics.median(row[0] for row in next(iter(found.values())))
    for name, rows in found.items():
        call, more, whole, alone = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:<32}{rows[0][0]:>13.3f}{call:>9.3f}{call / base:>8.2f}{more:>21.2f}{whole:>18.2f}{alone:>14.2f}")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def direct_write(path: Path, nbytes: int) -> float:
    """Write past the page cache from four threads' worth of requests, and sync; return the seconds."""
    block = host_empty(4 * 2**20)
    block.view(torch.float32).normal_()
    start = time.perf_counter()
    with File(path, nbytes, unlink=False) as file, IOEngine(threads=4) as engine:
        tickets = [
            engine.write(file, at, block) for at in range(0, nbytes // block.numel() * block.numel(), block.numel())
        ]
        for ticket in tickets:
            ticket.wait()
        file.fsync()
    return time.perf_counter() - start


def direct_copy(path: Path, nbytes: int) -> float:
    """Read a file and write another, both past the page cache, and sync; remove both, and return the seconds."""
    size = 4 * 2**20

    def carry(number: int) -> None:
        block = host_empty(size)
        for at in range(number * size, nbytes // size * size, 4 * size):
            engine.read(source, at, block).wait()
            engine.write(into, at, block).wait()

    other = path.with_name("direct-copy")
    start = time.perf_counter()
    with File.open(path) as source, File(other, nbytes, unlink=False) as into, IOEngine(threads=4) as engine:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(carry, range(4)))
        into.fsync()
    seconds = time.perf_counter() - start
    path.unlink()
    other.unlink()
    return seconds


def raw_write(path: Path, nbytes: int) -> None:
    block = torch.randn(4 * 2**20).numpy().tobytes()
    with open(path, "wb") as file:
        for _ in range(nbytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
