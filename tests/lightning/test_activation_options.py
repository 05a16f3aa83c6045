"""Trainer and command line: activation_checkpointing and offload_activations (DESIGN 8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cases import Net, assert_same, loader, net, trainer, weights, zinf
from test_cli import OURS, cli, printed
from torch import Tensor

from lightning_zinf import MemoryConfig, ZinfStrategy
from lightning_zinf.engine.partition import engine_of

SMALL = MemoryConfig(activation_min_bytes=1)
WAYS: dict[str, dict[str, Any]] = {
    "recompute": {"activation_checkpointing": True},
    "named": {"activation_checkpointing": ["Sequential"], "offload_activations": "cpu"},
    "recompute-nvme": {"activation_checkpointing": True, "offload_activations": "nvme", "memory": SMALL},
    "nvme": {"offload_activations": "nvme", "memory": SMALL},
}


def fitted(root: Path, kind: type[Net] = Net, **options: Any) -> tuple[Any, Any]:
    module = net(kind)
    used = trainer(root, zinf(**options), max_epochs=2, gradient_clip_val=0.5, accumulate_grad_batches=2)
    used.fit(module, loader(), loader(2, seed=1))
    return module, used


@pytest.mark.parametrize("place", ["device", "nvme"])
@pytest.mark.parametrize("way", WAYS)
def test_fit_has_the_bits_of_fit_without(way: str, place: str, tmp_path: Path) -> None:
    module, used = fitted(tmp_path, place=place, **WAYS[way])
    plain, _ = fitted(tmp_path, place=place)
    assert_same(weights(module), weights(plain))
    engine = engine_of(module)
    assert engine is not None
    away = engine.counters.activation_write_bytes
    assert (away > 0) == ("nvme" in way)
    if way == "recompute-nvme":
        # Two blocks in 12 batches; the first one's input, a batch of 4 x 130 floats, needs no gradient, but is kept.
        assert away == 12 * 2 * 4096
    assert used.callback_metrics["val_loss"] == used.callback_metrics["val_loss"]
    used.test(module, loader(2, seed=2), verbose=False)
    assert engine.counters.activation_write_bytes == away


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
def test_every_precision(precision: str, tmp_path: Path) -> None:
    results = []
    for options in (WAYS["recompute-nvme"], WAYS["nvme"], {}):
        module = net()
        trainer(tmp_path, zinf(**options), precision=precision).fit(module, loader())
        results.append(weights(module))
    assert_same(results[0], results[2])
    assert_same(results[1], results[2])


class TwoLosses(Net):
    """Manual optimization with two backwards through one graph, the first of which keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        out = self(batch)
        self.manual_backward(out.pow(2).mean(), retain_graph=True)
        self.manual_backward(out.sin().mean())
        optimizer.step()


@pytest.mark.parametrize("way", WAYS)
def test_manual_optimization_with_two_losses(way: str, tmp_path: Path) -> None:
    results = []
    for options in (WAYS[way], {}):
        module = net(TwoLosses)
        trainer(tmp_path, zinf(**options)).fit(module, loader())
        results.append(weights(module))
    assert_same(*results)


def test_other_options_undo_it(tmp_path: Path) -> None:
    module, _ = fitted(tmp_path, activation_checkpointing=True)
    assert all("forward" in block.__dict__ for block in module.blocks)
    trainer(tmp_path, zinf()).fit(module, loader())
    assert not any("forward" in block.__dict__ for block in module.blocks)


def test_what_was_chosen_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        staging = MemoryConfig(activation_bytes=5 * 2**20)
        fitted(tmp_path, activation_checkpointing=True, offload_activations="nvme", memory=staging)
    assert "2 modules are recomputed in backward, their inputs on nvme (by way of 5 MiB" in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activation_checkpointing": "Block"}, "True, False or a list of class names"),
        ({"activation_checkpointing": [torch.nn.Linear]}, "True, False or a list of class names"),
        ({"offload_activations": "auto"}, "'none', 'cpu', 'nvme'"),
        ({"offload_activations": True}, "'none', 'cpu', 'nvme'"),
    ],
)
def test_mistakes_are_refused_at_once(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ZinfStrategy(**options)


def test_on_the_command_line() -> None:
    strategy = cli(
        f"--trainer.strategy={OURS}",
        "--trainer.strategy.activation_checkpointing=[Block]",
        "--trainer.strategy.offload_activations=nvme",
        "--trainer.strategy.memory.activation_bytes=1000000",
    ).trainer.strategy
    assert strategy.activation_checkpointing == ["Block"]
    assert strategy.offload_activations == "nvme"
    assert strategy.memory.activation_bytes == 1000000
    strategy = cli(f"--trainer.strategy={OURS}", "--trainer.strategy.activation_checkpointing=true").trainer.strategy
    assert strategy.activation_checkpointing is True
    text = printed(f"--trainer.strategy.help={OURS}")
    assert "--trainer.strategy.activation_checkpointing" in text
    assert "compute the rest again in backward" in " ".join(text.split())
