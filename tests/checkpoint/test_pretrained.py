"""Pretrained weights: into models in memory, on disk and on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cases import WIDTH, Net, assert_same, loader, net, trainer
from safetensors.torch import save_file
from sharded_cases import strategy
from torch import nn

import lightning_zinf
from lightning_zinf import MemoryConfig, load_pretrained
from lightning_zinf.checkpoint.manifest import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(WIDTH)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Weights in two files with an index, the tied one once."""
    torch.manual_seed(5)
    state = {k: v.clone() for k, v in Tied().state_dict().items() if k != "head.weight"}
    folder = tmp_path / "hf"
    folder.mkdir()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, members in parts.items():
        save_file({n: state[n] for n in members}, folder / file)
    index = {"metadata": {}, "weight_map": {n: f for f, members in parts.items() for n in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, {**state, "head.weight": state["embed.weight"]}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_plain_module(files: Any, device: str) -> None:
    folder, state = files
    with torch.device(device):
        model = Tied()
    assert load_pretrained(model, folder) == ([], [])
    assert_same(dict(sorted(model.state_dict().items())), dict(sorted(state.items())))
    assert model.head.weight is model.embed.weight


def test_model_that_is_on_disk_while_it_is_built(files: Any, tmp_path: Path) -> None:
    folder, state = files

    class Pretrained(Net):
        def configure_model(self) -> None:
            if not hasattr(self, "inner"):
                self.inner = Tied()
                load_pretrained(self.inner, folder)

    model = net(Pretrained)
    small = MemoryConfig(host_bytes=300 * 2**10)
    used = trainer(tmp_path, strategy("nvme", memory=small))
    used.validate(model, loader(2), verbose=False)
    found = lightning_zinf.full_state_dict(model)
    for name, value in state.items():
        assert torch.equal(found[f"inner.{name}"], value), name


def test_renaming_and_what_does_not_match(files: Any, tmp_path: Path) -> None:
    folder, state = files
    model = Tied()
    wrapped = nn.ModuleDict({"inner": model})
    load_pretrained(wrapped, folder, rename=lambda name: f"inner.{name}")
    assert torch.equal(model.blocks[3].weight, state["blocks.3.weight"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Missing key.*'norm.weight'"):
        load_pretrained(model, folder, rename=lambda name: None if name.startswith("norm") else name)
    model.blocks[0] = nn.Linear(WIDTH, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.weight: the file has shape \(130, 130\)"):
        load_pretrained(model, folder)
    assert torch.equal(model.blocks[1].weight, before["blocks.1.weight"])
    missing, unexpected = load_pretrained(
        model, folder, strict=False, rename=lambda n: None if n.startswith("blocks.0") else n.replace("norm", "gone")
    )
    assert "norm.weight" in missing
    assert "gone.weight" in unexpected
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        load_pretrained(model, tmp_path)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors has a damaged header"):
        load_pretrained(model, folder)
