"""The engine on a GPU: the same bits wherever state lives, and several steps of everything that differs there.

Not run yet: no GPU was at hand. Run with `pytest -m gpu`; `benchmarks/gpu.sh` does. What a CPU can tell of it was seen
there: this file passes with ``DEVICE`` set to the CPU, and `test_sim.py` has its Trainer on a simulated device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import simdevice
import torch
import torch.distributed as dist
from driver import Where, session
from models import ZOO
from oracle import Recipe, Result, assert_same
from torch import nn

import lightning_zinf
from lightning_zinf.checkpoint.full import full_state_dict
from lightning_zinf.comm.group import Collectives, Ranks, Reduction, ranks_of
from lightning_zinf.engine import partition as partitioning
from lightning_zinf.engine.squares import sums_of_squares
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import AdamHyper, Segment, adam_update, cuda, reference, split_master

SIMULATED = os.environ.get("ZINF_TEST_DEVICE") == "sim"
DEVICE = simdevice.register() if SIMULATED else torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and DEVICE.type == "cuda", reason="needs a CUDA device"),
]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used

HOST = Where("none", "cpu")
PLACES = [
    Where("none", "none"),
    Where("none", "nvme"),
    Where("cpu", "cpu"),
    Where("cpu", "nvme", tight=True),
    Where("nvme", "nvme", tight=True),
    Where("nvme", "nvme", tight=True, prefetch=False),
    Where("auto", "auto", share=0.5),
]
MODELS = ["mlp", "gpt", "gpt-recompute", "cnn", "lstm", "mixture", "frozen", "encoder-decoder", "late"]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Have CUDA's kernels give the same bits each time."""
    torch.use_deterministic_algorithms(True)
    if SIMULATED:
        simdevice.start(1, 100, 1000)
    yield
    if SIMULATED:
        simdevice.finish()
    torch.use_deterministic_algorithms(False)


def train(name: str, folder: Path, where: Where, precision: str, recipe: Recipe, ranks: Ranks | None = None) -> Result:
    # Pooling without overlaps gives the same bits, of which torch is not sure; with warn_only attention would not.
    torch.use_deterministic_algorithms(True, warn_only=name == "cnn")
    with session(ZOO[name], folder, where, precision, recipe, ranks=ranks, device=DEVICE) as running:
        return running.train().result()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_every_place_has_the_bits_of_the_host(name: str, precision: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path, HOST, precision, Recipe())
    for where in PLACES:
        assert_same(train(name, tmp_path, where, precision, Recipe()), expected)


@pytest.mark.parametrize("where", PLACES[1:], ids=str)
def test_updates_in_backward(where: Where, tmp_path: Path) -> None:
    recipe = Recipe(clip_norm=None, accumulate=1, steps=8)
    expected = train("gpt", tmp_path, HOST, "bf16-mixed", recipe)
    assert_same(train("gpt", tmp_path, replace(where, early=True), "bf16-mixed", recipe), expected)


@pytest.mark.parametrize("activations", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations(recompute: bool, activations: Any, tmp_path: Path) -> None:
    expected = train("gpt", tmp_path, HOST, "bf16-mixed", Recipe())
    where = Where("nvme", "nvme", recompute=recompute, activations=activations, activation_bytes=2**20)
    assert_same(train("gpt", tmp_path, where, "bf16-mixed", Recipe()), expected)


@pytest.mark.parametrize("update", [reference.adam_update, cuda.adam_update], ids=["reference", "kernel"])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_on_the_device_has_the_bits_of_the_host(dtype: torch.dtype, decoupled: bool, update: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    numel = 3 * 2**20 + 5
    master, grad = torch.randn(numel, generator=draw), torch.randn(numel, generator=draw).to(dtype)
    weight, residual = torch.empty(numel, dtype=torch.bfloat16), torch.empty(numel, dtype=torch.int16)
    split_master(master, weight, residual)
    here = [weight, residual, torch.zeros(numel), torch.zeros(numel)]
    there = [plane.to(DEVICE) for plane in here]
    for step in (1, 2, 1000):
        hyper = [AdamHyper(1e-3, 0.9, 0.999, 1e-8, 0.1, step, decoupled)]
        adam_update(*here, [Segment(0, grad, 0)], hyper, grad_scale=0.3, clip_value=0.7)
        update(*there, [Segment(0, grad.to(DEVICE), 0)], hyper, grad_scale=0.3, clip_value=0.7)
        for name, ours, theirs in zip(("weight", "residual", "exp_avg", "exp_avg_sq"), there, here, strict=True):
            assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8)), f"{name} in step {step}"


@pytest.mark.skipif(DEVICE.type == "cpu", reason="compiles for CUDA")
def test_updates_on_the_device_are_not_slow() -> None:
    assert cuda.launcher(DEVICE) is not None  # a warning says why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_on_the_device(dtype: torch.dtype) -> None:
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 0, 1000, 5 * 2**20)]
    found = sums_of_squares([g.to(DEVICE) for g in grads])
    for ours, theirs, grad in zip(found, sums_of_squares(grads), grads, strict=True):
        assert (
            abs(ours - theirs) <= 2 * grad.numel() * 2.0**-53 * theirs
        )  # squares are exact, sums round once an element


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A process group of one rank."""
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield ranks_of(None, timedelta(seconds=60))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_rank_of_a_process_group(
    precision: str, alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of several ranks with one, in every stage: rounds, gathers by NCCL, shards that are the whole."""
    expected = train("gpt", tmp_path, HOST, precision, Recipe())
    monkeypatch.setattr(partitioning, "needs_no_others", lambda ranks: ranks is None)
    for stage in (1, 2, 3):
        for where in [HOST, *PLACES[:2], *(PLACES[2:5] if stage == 3 else [])]:
            with session(
                ZOO["gpt"], tmp_path, where, precision, Recipe(), ranks=alone, stage=stage, device=DEVICE
            ) as running:
                assert running.engine.reducer is not None
                assert_same(running.train().result(), expected)
                assert running.engine.counters.all_gather_bytes > 0


def test_collectives_are_done_when_they_say_so(alone: Ranks) -> None:
    comm = Collectives(alone, Counters())
    shard = torch.arange(2**22, device=DEVICE).to(torch.bfloat16)
    whole = torch.zeros_like(shard)
    comm.all_gather(whole, shard, "test").wait()
    assert torch.equal(whole, shard)
    comm.broadcast(whole)
    received = torch.empty_like(whole)
    work = dist.all_to_all_single(received, whole, group=alone.reduce_group, async_op=True)
    reduction = Reduction(comm, whole, received, work)
    while not reduction.arrived():
        time.sleep(0.001)
    assert torch.equal(reduction.mean(), shard.float())
    on_host = torch.zeros(16, dtype=torch.uint8)
    comm.all_gather(on_host, torch.arange(16, dtype=torch.uint8), "planes in host memory go by gloo").wait()
    assert torch.equal(on_host, torch.arange(16, dtype=torch.uint8))


class Net(pl.LightningModule):
    """A few blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4)])

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = (self.blocks(batch) - batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("place", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_trainer_saves_and_goes_on(precision: Any, place: Any, tmp_path: Path) -> None:
    """One epoch, a checkpoint, and another one have the weights of two epochs at once."""

    def fit(epochs: int, path: Path | None = None) -> tuple[Net, pl.Trainer]:
        torch.manual_seed(0)
        model = Net()
        data = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
        strategy = lightning_zinf.ZinfStrategy(
            offload_params=place, offload_optimizer=place, nvme_path=str(tmp_path), state_dict_type="sharded"
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            accelerator=DEVICE.type,
            devices=1,
            strategy=strategy,
            precision=precision,
            max_epochs=epochs,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **quiet,  # type: ignore[arg-type]
        )
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=path)  # type: ignore[arg-type]
        return model, trainer

    whole, _ = fit(2)
    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, tmp_path / "half.ckpt")
    expected = lightning_zinf.full_state_dict(whole)
    found = lightning_zinf.full_state_dict(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "half.ckpt" / "manifest.json").exists()


def test_large_copies_overlap_and_stay_whole(tmp_path: Path) -> None:
    """Units large enough for asynchronous copies to be under way for a while, with the least memory for them."""
    case = replace(ZOO["mlp"], build=_layers, batch=_large, loss=_distance)
    results = []
    for where in (HOST, Where("nvme", "nvme", tight=True)):
        with session(case, tmp_path, where, "bf16-mixed", Recipe(steps=6), device=DEVICE) as running:
            running.train()
            results.append((running.losses, full_state_dict(running.engine)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def _layers() -> nn.Module:
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)])


def _large(seed: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed)),)


def _distance(model: nn.Module, batch: Any, step: int) -> torch.Tensor:
    return (model(batch[0]).float() - batch[0]).pow(2).mean()
