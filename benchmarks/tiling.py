"""Memory-centric tiling: the largest layer that trains under a memory cap, and what tiles cost in time.

    python benchmarks/tiling.py               # about 20 minutes on 2 cores
    python benchmarks/tiling.py --part time   # the times alone, about 2 minutes

The first part is Figure 6b of the ZeRO-Infinity paper, scaled down: for each tiling factor the largest hidden size
``h`` whose single linear layer of ``h x 4h`` trains three steps in bf16-mixed with everything on NVMe, found by
bisection. A child process builds and trains it with its data segment capped by RLIMIT_DATA, counted from what it has
after its imports, as in fits.py. ``train`` updates the layer; ``adapter`` freezes it and trains low-rank matrices
beside it.

The second part times steps of a layer with state in memory and on NVMe, round by round in turn, as ratios to the step
without tiling of the same round.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

STEP = 256
"""Hidden sizes are multiples of this."""


def data_bytes() -> int:
    """Return the size of this process's data segment, what RLIMIT_DATA is held against."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmData in /proc/self/status")


def module(hidden: int, mode: str) -> Any:
    """Return a module that trains one layer, or adapters beside it."""
    import lightning.pytorch as pl
    import torch
    from torch import nn

    class Wide(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer: nn.Linear | None = None
            self.adapter: nn.Module | None = None

        def configure_model(self) -> None:
            if self.layer is not None:
                return
            self.layer = nn.Linear(hidden, 4 * hidden, bias=False)
            if mode == "adapter":
                self.layer.requires_grad_(False)
                self.adapter = nn.Sequential(nn.Linear(hidden, 4, bias=False), nn.Linear(4, 4 * hidden, bias=False))

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            assert self.layer is not None
            out = self.layer(batch)
            return (out if self.adapter is None else out + self.adapter(batch)).float().square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    return Wide()


def trainer(strategy: Any, steps: int, **options: Any) -> Any:
    """Return a quiet Trainer."""
    import lightning.pytorch as pl

    return pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, precision="bf16-mixed", max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def tiling(hidden: int, factor: int) -> Any:
    """Return the option that cuts the layer into ``factor`` tiles."""
    from lightning_zinf import TilingConfig

    return TilingConfig(None if factor == 1 else 4 * hidden * hidden * 2 // factor)


def child(args: argparse.Namespace) -> None:
    """Train a few steps under the cap."""
    import torch

    from lightning_zinf import ZinfStrategy

    torch.set_num_threads(args.threads)
    wide = module(args.hidden, args.mode)
    data = torch.randn(3, args.hidden, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(data, batch_size=1)  # type: ignore[arg-type,var-annotated]
    strategy = ZinfStrategy(
        offload_params="nvme",
        offload_optimizer="nvme",
        nvme_path=args.folder,
        tiling=tiling(args.hidden, args.factor),
    )
    limit = data_bytes() + args.cap * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    trainer(strategy, 3).fit(wide, loader)
    tiles = len(strategy.engine.tiled[0].tiles) if strategy.engine.tiled else 1
    print(json.dumps({"tiles": tiles, "peak": strategy.engine.context.ring.peak}))


def trains(args: argparse.Namespace, mode: str, factor: int, hidden: int) -> dict[str, Any] | None:
    """Return what a child says that trained, or None if it ran out of memory.

    Raises:
        RuntimeError: If it failed for another reason.
    """
    with tempfile.TemporaryDirectory(dir=args.nvme_path or ".") as folder:
        command = [sys.executable, __file__, "--child", "--cap", str(args.cap), "--threads", str(args.threads)]
        command += ["--mode", mode, "--factor", str(factor), "--hidden", str(hidden), "--folder", folder]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == 0:
        found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
        return found
    said = run.stderr + run.stdout
    # A thread whose stack finds no room is "temporarily unavailable"; the last is what the plan says before training.
    signs = ("memory", "MemoryError", "bad_alloc", "Resource temporarily unavailable", "does not fit")
    if run.returncode < 0 or any(sign in said for sign in signs):
        return None
    raise RuntimeError(f"hidden size {hidden} failed for another reason than memory:\n{said[-2000:]}")


def largest(args: argparse.Namespace, mode: str, factor: int, low: int) -> tuple[int, dict[str, Any]]:
    """Return the largest hidden size that trains, from ``low`` on, by bisection."""
    best: dict[str, Any] = {}
    low, high = low // STEP, args.most // STEP + 1
    while high - low > 1:
        middle = (low + high) // 2
        found = trains(args, mode, factor, middle * STEP)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return low * STEP, best


def sizes(args: argparse.Namespace) -> None:
    """Print the largest hidden size for each factor."""
    print(
        f"largest hidden size h whose layer h x 4h trains within {args.cap} MiB (multiples of {STEP}, to {args.most})"
    )
    for mode in args.modes:
        print(f"\n{mode:<10}{'factor':>8}{'tiles':>8}{'h':>8}{'x':>7}{'weight in bf16, MiB':>22}{'slots, MiB':>12}")
        first = 0
        low = 0
        for factor in args.factors:
            low, best = largest(args, mode, factor, low)
            first = first or low
            row = f"{'':<10}{factor:>8}{best.get('tiles', '-'):>8}{low:>8}{low / max(first, 1):>7.2f}"
            print(f"{row}{8 * low * low / 2**20:>22.1f}{best.get('peak', 0) / 2**20:>12.1f}", flush=True)


def times(args: argparse.Namespace) -> None:
    """Print the time of steps, by factor, as ratios in one run."""
    import torch

    from lightning_zinf import ZinfStrategy

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    hidden = args.time_hidden
    print(f"\ntime of a step of a layer {hidden} x {4 * hidden}, {args.tokens} tokens")
    print(f"x of the untiled step of the same round, medians of {args.rounds} rounds")
    print(f"{'':<20}" + "".join(f"{f:>8}" for f in args.factors) + "   factor; s untiled")
    data = torch.randn(args.tokens * 4, hidden, generator=torch.Generator().manual_seed(0))
    for place, offload in (("state in memory", "none"), ("everything on NVMe", "nvme")):
        taken: dict[int, list[float]] = {f: [] for f in args.factors}
        for _ in range(args.rounds):
            for factor in args.factors:
                with tempfile.TemporaryDirectory(dir=args.nvme_path or ".") as folder:
                    strategy = ZinfStrategy(
                        offload_params=offload,  # type: ignore[arg-type]
                        offload_optimizer=offload,  # type: ignore[arg-type]
                        nvme_path=folder,
                        tiling=tiling(hidden, factor),
                    )
                    loader = torch.utils.data.DataLoader(data, batch_size=args.tokens)  # type: ignore[arg-type,var-annotated]
                    taken[factor].append(one_run(strategy, hidden, loader))
        base = taken[args.factors[0]]
        ratios = [statistics.median(t / b for t, b in zip(taken[f], base, strict=True)) for f in args.factors]
        print(f"{place:<20}" + "".join(f"{r:>8.2f}" for r in ratios) + f"   {statistics.median(base):.4f}", flush=True)
    if args.deepspeed:
        deepspeed(args)


def deepspeed(args: argparse.Namespace) -> None:
    """Print what DeepSpeed's TiledLinear costs, in plain torch and in memory, beside its own untiled layer."""
    command = [args.deepspeed, str(Path(__file__).with_name("_deepspeed_tiling.py"))]
    for name in ("tokens", "rounds", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--hidden", str(args.time_hidden), "--factors", *map(str, args.factors)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"DeepSpeed's TiledLinear failed:\n{out.stderr[-2000:]}")
    ratios = json.loads(out.stdout.strip().splitlines()[-1])
    print(f"{'DeepSpeed, no ZeRO':<20}" + "".join(f"{statistics.median(r):>8.2f}" for r in ratios.values()), flush=True)


def one_run(strategy: Any, hidden: int, loader: Any) -> float:
    """Return the median time of a step, the first two of 8 left out."""
    from lightning.pytorch.callbacks import Callback

    class Clock(Callback):
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.stamps.append(time.perf_counter())

    clock = Clock()
    wide = module(hidden, "train")
    trainer(strategy, 8, callbacks=[clock], max_epochs=-1).fit(wide, loader)
    strategy.engine.dissolve()
    steps = [b - a for a, b in zip(clock.stamps, clock.stamps[1:], strict=False)]
    return statistics.median(steps[2:])


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "size", "time"], default="all")
    parser.add_argument("--modes", nargs="+", choices=["train", "adapter"], default=["train", "adapter"])
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--cap", type=int, default=96, help="MiB beyond what the process has after its imports")
    parser.add_argument("--most", type=int, default=8192, help="largest hidden size that is tried")
    parser.add_argument("--time-hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nvme-path", default="", help="folder on a disk; default: a temporary one here")
    parser.add_argument("--deepspeed", default="", help="an interpreter that has DeepSpeed, for its TiledLinear")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for name in ("mode", "folder"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    for name in ("factor", "hidden"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    if args.part in ("all", "size"):
        sizes(args)
    if args.part in ("all", "time"):
        times(args)


if __name__ == "__main__":
    main()
