"""Scale: what a unit costs however many there are, and step time as the model grows.

    python benchmarks/scale.py

The first table trains stacks of 125 to 2,000 tiny blocks (16 x 16), a unit each, with everything on NVMe: a step is
nothing but what happens around the arithmetic, and it should take the same time a unit. The second grows the width of a
stack of 8 blocks: step time a parameter, with everything on NVMe, should not grow. Both are ratios to the first row of
the same round, medians over rounds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any


def step_seconds(blocks: int, width: int, tokens: int, steps: int, folder: str) -> tuple[float, int]:
    """Return the median time of a step, the first three left out, and the number of parameters."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import Callback
    from torch import nn

    from lightning_zinf import ZinfStrategy

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(x)

    class Stack(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            out: torch.Tensor = self.blocks(batch)
            return out.float().square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-5)

    class Clock(Callback):
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.stamps.append(time.perf_counter())

    clock, model = Clock(), Stack()
    strategy = ZinfStrategy(offload_params="nvme", offload_optimizer="nvme", nvme_path=folder, units=["Block"])
    data = torch.randn(tokens * (steps + 4), width, generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        max_steps=steps + 4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=tokens))  # type: ignore[arg-type,var-annotated]
    params = sum(p.numel() for p in model.parameters())
    strategy.engine.dissolve()
    taken = [b - a for a, b in zip(clock.stamps, clock.stamps[1:], strict=False)]
    return statistics.median(taken[3:]), params


def table(title: str, cases: list[tuple[int, int, int]], per: int, args: argparse.Namespace) -> None:
    """Print step time a unit (``per=0``) or a parameter (``per=1``) of ``(blocks, width, tokens)``."""
    rates: list[list[float]] = [[] for _ in cases]
    shown: list[tuple[int, float]] = [(0, 0.0)] * len(cases)
    for _ in range(args.rounds):
        for row, (blocks, width, tokens) in enumerate(cases):
            with tempfile.TemporaryDirectory(dir=args.nvme_path or ".") as folder:
                seconds, params = step_seconds(blocks, width, tokens, args.steps, folder)
            rates[row].append(seconds / (params if per else blocks))
            shown[row] = params, seconds
    print(f"\n{title}\n{'units':>8}{'width':>8}{'M params':>10}{'s a step':>10}{'x first':>9}")
    for (blocks, width, _), rate, (params, seconds) in zip(cases, rates, shown, strict=True):
        ratio = statistics.median(r / first for r, first in zip(rate, rates[0], strict=True))
        print(f"{blocks:>8}{width:>8}{params / 1e6:>10.1f}{seconds:>10.3f}{ratio:>9.2f}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--units", type=int, nargs="+", default=[125, 500, 1000, 2000])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nvme-path", default="", help="folder on a disk; default: a temporary one here")
    args = parser.parse_args()
    import lightning.pytorch  # noqa: F401  # sets its loggers up
    import torch

    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    table("what a unit costs", [(count, 16, 2) for count in args.units], 0, args)
    table("what a parameter costs", [(8, width, 64) for width in args.widths], 1, args)


if __name__ == "__main__":
    main()
