"""Runs that are saved, damaged and resumed in the tests of sharded checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning_cases import Net, loader, net, trainer
from torch import Tensor, nn

import lightning_zinf

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"offload_params": "none", "offload_optimizer": "none"},
    "cpu": {"offload_params": "none", "offload_optimizer": "cpu"},
    "nvme": {"offload_params": "nvme", "offload_optimizer": "nvme"},
    "stage-2": {"stage": 2},
    "stage-1": {"stage": 1},
    "copies": {"stage": 2, "shard_size": 1},
    "tiled": {
        "offload_params": "nvme",
        "offload_optimizer": "nvme",
        "tiling": lightning_zinf.TilingConfig(16 * 130 * 2),
    },
}


class Model(Net):
    """Tied and frozen weights, a buffer that changes, and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(130, 130, bias=False)
        self.again.weight = self.blocks[0][0].weight
        self.frozen = nn.Linear(130, 130).requires_grad_(False)
        self.norm = nn.BatchNorm1d(130)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x + self.frozen(torch.tanh(self.again(x)))))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def strategy(setting: str, **options: Any) -> Any:
    return lightning_zinf.ZinfStrategy(state_dict_type="sharded", **{**SETTINGS[setting], **options})


def fit(
    folder: Path, setting: str, epochs: int, size: int = 1, path: Any = None, kind: type[Net] = Model, **options: Any
) -> tuple[Any, Any]:
    model = net(kind)
    running = trainer(folder, strategy(setting), devices=size, max_epochs=epochs, **options)
    running.fit(model, loader(8), loader(2, seed=1), ckpt_path=path)
    return model, running


def everything(model: Any, running: Any) -> dict[str, Tensor]:
    """Return weights, buffers and optimizer state."""
    state = dict(lightning_zinf.full_state_dict(model))
    for number, optimizer in enumerate(running.optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                state[f"optimizer {number}, parameter {index}, {name}"] = torch.as_tensor(value)
    return state


_MEASURE = """
import sys, threading, time
import torch, lightning_zinf.cli, {modules}
def anonymous():
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])
before, peak = anonymous(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
assert lightning_zinf.cli.main(sys.argv[1:]) == 0
print('used', peak[0] - before)
"""


def memory_of(arguments: list[str], *modules: str) -> int:
    """Return the most bytes of anonymous memory that the zinf command takes, beyond what imports take.

    Args:
        arguments: Of the command.
        modules: What it imports late.
    """
    script = _MEASURE.format(modules=", ".join(modules))
    done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True)
    return int(done.stdout.rsplit(maxsplit=1)[-1]) * 1024
