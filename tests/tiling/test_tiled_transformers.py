"""Models of Hugging Face, where they are installed: GPT-2 with its Conv1D and tied head, and LoRA beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_cases import trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_zinf import TilingConfig, ZinfStrategy

transformers = pytest.importorskip("transformers")


class Language(pl.LightningModule):
    def __init__(self, lora: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=128, n_positions=16, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        self.model: Any = transformers.GPT2LMHeadModel(config)
        if lora:
            peft = pytest.importorskip("peft")
            self.model = peft.get_peft_model(
                self.model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
            )
        self.losses: list[float] = []

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_gpt2(lora: bool, tmp_path: Path) -> None:
    data = torch.randint(0, 128, (12, 16), generator=torch.Generator().manual_seed(0))
    losses, states = [], []
    for tiling in (TilingConfig(), TilingConfig(8192)):
        model = Language(lora)
        strategy = ZinfStrategy(offload_params="nvme", offload_optimizer="nvme", tiling=tiling)
        trainer(tmp_path, strategy, max_epochs=2).fit(model, DataLoader(data, batch_size=4))  # type: ignore[arg-type]
        tiled = {t.name.split("model.")[-1].replace(".base_layer", "") for t in strategy.engine.tiled}
        if tiling.max_tile_bytes is not None:
            layers = {
                f"transformer.h.{i}.{n}.weight" for i in (0, 1) for n in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")
            }
            assert {*layers, "transformer.wte.weight"} <= tiled
        losses.append(model.losses)
        states.append(list(model.state_dict()))
    assert states[0] == states[1]
    assert len(set(losses[0])) == len(losses[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
