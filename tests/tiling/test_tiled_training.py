"""A Trainer whose strategy tiles layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_summary import ModelSummary
from lightning_cases import assert_same, trainer, weights
from sharded_cases import everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_zinf
from lightning_zinf import TilingConfig, ZinfStrategy
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.tiling.dispatch import blocks_of

WIDTH = 144
"""A multiple of 16, as are the rows of tiles: BLAS takes the same kernels for both (see test_tiled_layers.py)."""
TILE = 16 * WIDTH * 4
"""Bytes of 16 rows in float32, or of 32 in bfloat16."""
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "tiled": {"tiling": TilingConfig(TILE)},
    "tiled-nvme": {"tiling": TilingConfig(TILE), "offload_params": "nvme", "offload_optimizer": "nvme"},
    "parts-of-rows": {"tiling": TilingConfig(200), "offload_optimizer": "nvme"},
}


class Exact(pl.LightningModule):
    """Tied, frozen and trained layers. The only one that is tiled and trained has an input that needs no gradient.

    So tiling makes no difference: of others, the gradient of the input is summed in another order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        out: Tensor = self.head(torch.tanh(self.first(x)) + self.again(x)) * self.scale
        return out

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - batch.sum(1, keepdim=True)).pow(2).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def build() -> Any:
    torch.manual_seed(1)
    return Exact()


def loader(batches: int = 6, seed: int = 0) -> DataLoader[Tensor]:
    data = torch.randn(batches * 4, WIDTH, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, batch_size=4)  # type: ignore[arg-type]


def fit(
    folder: Path, setting: str, epochs: int, path: Any = None, precision: Any = "32-true", **options: Any
) -> tuple[Any, pl.Trainer]:
    strategy = ZinfStrategy(state_dict_type=options.pop("kind", "sharded"), **SETTINGS[setting])
    model = build()
    running = trainer(folder, strategy, max_epochs=epochs, precision=precision, gradient_clip_val=1e6, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "zinf: . parameters larger than")  # biases
        running.fit(model, loader(8), loader(2, seed=1), ckpt_path=path)
    tiled = blocks_of(model.again.weight)
    assert (tiled is None) == (setting == "whole")
    return model, running


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_the_bits_of_untiled_training(precision: Any, tmp_path: Path) -> None:
    expected = everything(*fit(tmp_path, "whole", 2, precision=precision))
    for setting in ("tiled", "tiled-nvme"):
        assert_same(everything(*fit(tmp_path, setting, 2, precision=precision)), expected)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("sharded", "bf16-mixed"),
        pytest.param("full", "32-true", marks=pytest.mark.slow),
        pytest.param("sharded", "32-true", marks=pytest.mark.slow),
        pytest.param("full", "bf16-mixed", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_in_and_out(kind: str, precision: Any, tmp_path: Path) -> None:
    """Whole, tiled, tiled otherwise and back, through a checkpoint each time: everything is as it was."""
    _, running = fit(tmp_path, "whole", 1, precision=precision, kind=kind)
    expected = everything(running.lightning_module, running)
    path = tmp_path / "whole.ckpt"
    running.save_checkpoint(path)
    for setting in ("tiled", "parts-of-rows", "tiled-nvme", "whole"):
        model, running = fit(tmp_path, setting, 1, path, precision=precision, kind=kind)
        assert_same(everything(model, running), expected)
        path = tmp_path / f"{setting}.ckpt"
        running.save_checkpoint(path)
    last = tmp_path / "last.ckpt"
    if kind == "sharded":
        from lightning_zinf.checkpoint.consolidate import to_ckpt

        with Checkpoint(tmp_path / "tiled-nvme.ckpt") as source:
            assert source.manifest.to_json().count('"part"') > 9
            to_ckpt(source, last)
    else:
        last = path
    plain = Exact.load_from_checkpoint(last)
    assert_same(dict(plain.state_dict()), {n: v for n, v in expected.items() if n in plain.state_dict()})
    saved = torch.load(last, weights_only=True)
    moments = saved["optimizer_states"][0]["state"]
    assert [tuple(entry["exp_avg"].shape) for entry in moments.values()] == [(WIDTH, WIDTH), (WIDTH,), (1, WIDTH), (1,)]
    for number, entry in moments.items():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(entry[name], expected[f"optimizer 0, parameter {number}, {name}"])


def test_resuming_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    expected = everything(*fit(tmp_path, "whole", 3))
    _, running = fit(tmp_path, "tiled-nvme", 1)
    running.save_checkpoint(tmp_path / "one.ckpt")
    _, running = fit(tmp_path, "whole", 2, tmp_path / "one.ckpt")
    running.save_checkpoint(tmp_path / "two.ckpt")
    assert_same(everything(*fit(tmp_path, "tiled", 3, tmp_path / "two.ckpt")), expected)


def test_nothing_changes_from_outside(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, "whole", 1)
    tiled, running = fit(tmp_path, "tiled-nvme", 1)
    assert str(ModelSummary(tiled, max_depth=-1)) == str(ModelSummary(model, max_depth=-1))
    assert [(n, p.shape, p.dtype) for n, p in tiled.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in model.named_parameters()
    ]
    assert tiled.again.weight is tiled.first.weight
    assert list(tiled.state_dict()) == list(model.state_dict())
    x = next(iter(loader(1)))
    assert torch.equal(tiled(x), model(x))
    assert torch.equal(torch.cat(running.predict(tiled, loader(1))), model(x))  # type: ignore[arg-type]
    # Another Trainer without tiling takes the tiles apart.
    trainer(tmp_path, "device").fit(tiled, loader(1))
    assert blocks_of(tiled.again.weight) is None
    again = trainer(tmp_path, ZinfStrategy(tiling=TilingConfig(TILE)))
    again.fit(tiled, loader(1))
    trainer(tmp_path, "device").fit(model, loader(1))
    trainer(tmp_path, "device").fit(model, loader(1))
    assert_same(weights(tiled), weights(model))


@pytest.mark.slow
def test_averages(tmp_path: Path) -> None:
    results = {}
    for setting in ("whole", "tiled-nvme"):
        model, running = fit(tmp_path / setting, setting, 2, callbacks=[lightning_zinf.ZinfEMA(0.8)], kind="full")
        running.save_checkpoint(tmp_path / f"{setting}.ckpt")
        resumed, _ = fit(
            tmp_path, setting, 3, tmp_path / f"{setting}.ckpt", callbacks=[lightning_zinf.ZinfEMA(0.8)], kind="full"
        )
        results[setting] = (weights(model), weights(resumed))
    for found, expected in zip(results["tiled-nvme"], results["whole"], strict=True):
        assert_same(found, expected)


class LanguageModel(pl.LightningModule):
    """A head that is tied to the embedding, and a loss that never has all of the logits."""

    def __init__(self, tiled_loss: bool) -> None:
        super().__init__()
        self.tiled_loss = tiled_loss
        self.embed, self.mix = nn.Embedding(512, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 512, bias=False)
        self.head.weight = self.embed.weight
        self.losses: list[float] = []

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        x, target = torch.tanh(self.mix(self.embed(ids[:, :-1]))), ids[:, 1:]
        if self.tiled_loss:
            loss = lightning_zinf.tiled_linear_cross_entropy(x, self.head.weight, target, classes=100, tokens=7)
        else:
            loss = F.cross_entropy(self.head(x).flatten(0, 1).float(), target.flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("setting", ["whole", "tiled-nvme"])
def test_the_loss_in_tiles(setting: str, tmp_path: Path) -> None:
    data = torch.randint(0, 512, (24, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for tiled_loss in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(tiled_loss)
        running = trainer(tmp_path, ZinfStrategy(**SETTINGS[setting]))
        running.fit(model, DataLoader(data, batch_size=4))  # type: ignore[arg-type]
        assert running.strategy.engine.counters.refills == 0  # type: ignore[attr-defined]
        losses.append(model.losses)
    assert losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_layer_larger_than_the_budget(tmp_path: Path) -> None:
    """Untiled it is refused with the numbers; built in ``configure_model`` and tiled it trains."""

    class Large(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: nn.Module | None = None

        def configure_model(self) -> None:
            if self.model is None:
                torch.manual_seed(0)
                self.model = nn.Sequential(nn.Linear(128, 2048), nn.ReLU(), nn.Linear(2048, 1))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            assert self.model is not None
            return self.model(batch[:, :128]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    memory = lightning_zinf.MemoryConfig(host_bytes=600_000)
    io = lightning_zinf.IOConfig(tile_numel=4096)
    options: dict[str, Any] = {"offload_params": "nvme", "offload_optimizer": "nvme", "memory": memory, "io": io}
    with pytest.raises(ValueError, match=r"the largest unit of the model needs 1\.01 MiB"):
        trainer(tmp_path, ZinfStrategy(**options)).fit(Large(), loader(3))
    model, auto = Large(), ZinfStrategy(**options, tiling=TilingConfig("auto"))
    trainer(tmp_path, auto).fit(model, loader(3))
    assert auto.engine.counters.overcommits == 0
    assert auto.engine.context.ring.peak <= 600_000
    plain = Large()
    trainer(tmp_path, "device").fit(plain, loader(3))
    assert_same(weights(model), weights(plain))


def test_the_option_is_checked() -> None:
    with pytest.raises(ValueError, match=r"tiling must be a lightning_zinf\.TilingConfig, got 5"):
        ZinfStrategy(tiling=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": ["Linear"]}, {"offload_activations": "cpu"}], ids=lambda o: next(iter(o))
)
def test_beside_what_is_done_to_activations(options: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for more in ({}, options):
        model, strategy = build(), ZinfStrategy(**SETTINGS["tiled-nvme"], **more)
        trainer(tmp_path, strategy).fit(model, loader(3))
        results.append(weights(model))
        assert len(strategy.engine.tiled) == 2
    assert_same(*results)
