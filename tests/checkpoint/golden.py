"""The model of the golden checkpoint; ``python tests/checkpoint/golden.py FOLDER`` writes one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_zinf


class Small(pl.LightningModule):
    """Tied, frozen and float32 weights beside bfloat16 ones, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.norm(self.frozen(self.second(self.first(batch)))).square().mean() + self.first.bias.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


def trained(folder: Path, steps: int, path: Path | None = None) -> tuple[Small, pl.Trainer]:
    torch.manual_seed(0)
    model = Small()
    strategy = lightning_zinf.ZinfStrategy(offload_params="none", offload_optimizer="none", state_dict_type="sharded")
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, precision="bf16-mixed", max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.linspace(-1, 1, 48).view(12, 4), batch_size=2), ckpt_path=path)  # type: ignore[arg-type]
    return model, trainer


if __name__ == "__main__":
    model, trainer = trained(Path(sys.argv[1]), 2)
    trainer.save_checkpoint(Path(sys.argv[1]) / "golden.ckpt")
    torch.save(lightning_zinf.full_state_dict(model), Path(sys.argv[1]) / "golden.pt")
