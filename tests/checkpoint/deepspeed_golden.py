"""Checkpoints that DeepSpeed itself wrote: ``python tests/checkpoint/deepspeed_golden.py FOLDER``.

It needs an environment with deepspeed (0.19.8 wrote what is in ``deepspeed/``), lightning and safetensors; the tests
need none of it but what is written. For each stage two ranks train with torch's AdamW on a CPU, and save as Lightning's
DeepSpeedStrategy does (stage 2) or as plain DeepSpeed does. What is expected is asked from the running engine, by
DeepSpeed's functions for that, not read from the files. Those functions are wrong with round_robin_gradients (they go
by the order without it), so for stage 2 it is asked from a run without, which has the same numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 3
STAGES = {
    1: {"bf16": True, "options": {"parameter_alignment": True}},
    2: {"bf16": False, "options": {"round_robin_gradients": True}},
    3: {"bf16": True, "options": {"sub_group_size": 20, "stage3_param_persistence_threshold": 0}},
}


class Tiny(nn.Module):
    """Tied and frozen weights, buffers that change, and odd sizes that have to be padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("count", torch.tensor(0))
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.embed(ids)) + self.frozen(self.embed(ids))
        if self.training:
            self.mean.lerp_(x.detach().mean(0).to(self.mean.dtype), 0.1)
            self.count += 1
        return self.head(self.norm(x - self.mean.to(x.dtype)) * self.scale).float().logsumexp(1).mean()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the param groups: matrices decay, vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if getattr(p, "ds_shape", p.shape).numel() > 9], "weight_decay": 0.1},
        {"params": [p for p in trained if getattr(p, "ds_shape", p.shape).numel() <= 9], "weight_decay": 0.0},
    ]


def lightning_content() -> dict[str, Any]:
    """Return what Lightning's DeepSpeedStrategy gives to DeepSpeed, of a run of as many steps."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=STEPS, enable_model_summary=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(STEPS, 2)))  # type: ignore[arg-type]
    content = trainer._checkpoint_connector.dump_checkpoint()
    return {k: v for k, v in content.items() if k not in ("state_dict", "optimizer_states")}


def write(stage: int, folder: Path, saves: bool, asks: bool) -> None:
    """Train and save; run by each rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from safetensors.torch import load_file

    content = lightning_content() if stage == 2 else {"epoch": 0}
    rank = int(sys.argv[3])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(stage)
    model = Tiny()
    options: dict[str, Any] = dict(STAGES[stage]["options"])  # type: ignore[arg-type]
    if not saves:
        options.pop("round_robin_gradients")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": STAGES[stage]["bf16"]},
        "zero_optimization": {"stage": stage, **options},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(groups(model), lr=0.05, betas=(0.9, 0.95))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        engine.backward(engine(torch.randint(0, 7, (4,), generator=generator)))
        engine.step()
    if saves:
        engine.save_checkpoint(str(folder), tag="checkpoint" if stage == 2 else None, client_state=content)
    if asks:
        ask(engine, stage, folder, rank)
    elif rank == 0:  # the same numbers, as far as there is a way to see them
        known = load_file(folder / "expected.safetensors")
        for name, param in engine.module.named_parameters():
            assert torch.equal(param, known[f"master {name}" if param.requires_grad else f"frozen {name}"]), name
    torch.distributed.barrier()


def ask(engine: Any, stage: int, folder: Path, rank: int) -> None:
    """Write what the engine says that it has."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from safetensors.torch import save_file

    if stage < 3:  # which finds the moments of optimizers that make them in their first step only when told again
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    expected: dict[str, Tensor] = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            expected[f"master {name}"] = safe_get_full_fp32_param(param)
            for kind in ("exp_avg", "exp_avg_sq"):
                expected[f"{kind} {name}"] = safe_get_full_optimizer_state(param, kind)
        else:
            with deepspeed.zero.GatheredParameters([param], enabled=stage == 3):
                expected[f"frozen {name}"] = param.detach().clone()
    expected.update({f"buffer {name}": value for name, value in engine.module.named_buffers()})
    if rank == 0:
        save_file({n: v.detach().clone().contiguous() for n, v in expected.items()}, folder / "expected.safetensors")


def main(root: Path) -> None:
    for stage in STAGES:
        folder = root / f"stage-{stage}"
        folder.mkdir(parents=True)
        for what in ("asks", "saves") if stage == 2 else ("asks saves",):
            base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + stage)}
            command = [sys.executable, __file__, str(folder), str(stage)]
            ranks = [subprocess.Popen([*command, str(rank), what], env=base) for rank in range(2)]
            codes = [rank.wait() for rank in ranks]
            if any(codes):
                sys.exit(f"stage {stage} failed")
        for tool in folder.glob("*.py"):
            tool.unlink()  # DeepSpeed's own, which it puts beside each checkpoint


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        write(int(sys.argv[2]), Path(sys.argv[1]), "saves" in sys.argv[4], "asks" in sys.argv[4])
