"""What the ranks of the FSDP2 test do: load as ModelParallelStrategy does, and save again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning_cases import net
from sharded_cases import Model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def load_and_save(rank: int, size: int, path: Path, out: Path) -> dict[str, Tensor]:
    model = net(Model)
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model.blocks[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    state: dict[str, Any] = {"state_dict": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["state_dict"])
    loaded = {"optimizer_0": get_optimizer_state_dict(model, optimizer)}
    dcp.load(loaded, checkpoint_id=path)
    set_optimizer_state_dict(model, optimizer, loaded["optimizer_0"])
    again = {"state_dict": get_model_state_dict(model), "optimizer_0": get_optimizer_state_dict(model, optimizer)}
    dcp.save(again, checkpoint_id=out)
    if rank == 0:
        shutil.copy(path / "meta.pt", out / "meta.pt")
    dist.barrier()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
