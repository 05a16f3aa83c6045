"""A model and its engine go together: memory, files and threads are given back."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_zinf.engine.partition import PartitionConfig, engine_of, forget, partition
from lightning_zinf.optim.binding import OptimizerBinding


def trained(tmp_path: Path, offload: str, precision: str) -> nn.Module:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    config = PartitionConfig(torch.device("cpu"), precision, offload, offload, (str(tmp_path),))  # type: ignore[arg-type]
    engine = partition(module, config, list(module.parameters()))
    OptimizerBinding(optimizer, engine)
    for _ in range(2):
        with engine.frame("train") as outputs, torch.autocast("cpu", enabled=precision != "32-true"):
            outputs.append(module(torch.ones(2, 64)).square().mean())
        engine.before_backward()
        outputs[-1].backward()
        engine.after_backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("offload", ["none", "nvme"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_both_are_freed(tmp_path: Path, offload: str, precision: str) -> None:
    module = trained(tmp_path, offload, precision)
    refs = [weakref.ref(module), weakref.ref(engine_of(module))]
    del module
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_a_parameter_that_outlives_its_model_says_so(tmp_path: Path) -> None:
    module = trained(tmp_path, "nvme", "32-true")
    weight = module[0].weight
    del module
    gc.collect()
    with pytest.raises(RuntimeError, match="the model that it belonged to is gone"):
        weight.sum()


def test_forget_gives_ordinary_parameters_back(tmp_path: Path) -> None:
    module = trained(tmp_path, "nvme", "bf16-mixed")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    forget(module)
    assert engine_of(module) is None
    assert all(type(p) is nn.Parameter for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert list(tmp_path.iterdir()) == []
