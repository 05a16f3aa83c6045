"""What a parameter in tiles is for those who use it: the same object, with the same values."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from driver import CPU, Session, Where, session
from models import Case
from oracle import Recipe
from tiled_models import Conv1D, Conv1Ds
from torch import Tensor, nn

from lightning_zinf import MemoryConfig, TiledEmbedding, TiledLinear, TilingConfig, gathered
from lightning_zinf.config import IOConfig, PartitionConfig
from lightning_zinf.engine.partition import engine_of, forget, partition
from lightning_zinf.tiling.dispatch import blocks_of
from lightning_zinf.tiling.plan import plan_tiles

PLACES = [Where("none", "none"), Where("nvme", "nvme"), Where("nvme", "nvme", aliased=False)]
RECIPE = Recipe(steps=2, accumulate=1)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)), torch.tensor([1, 2, 3, 4])


WIDE = Case(Wide, batch, tile_bytes=4096)


@contextmanager
def running(folder: Path, where: Where = PLACES[1], precision: str = "bf16-mixed") -> Iterator[tuple[Session, Any]]:
    with session(WIDE, folder, where, precision, RECIPE) as used:
        assert blocks_of(used.model.up.weight) is not None  # type: ignore[union-attr,arg-type]
        yield used, used.model


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_same_object_with_the_same_values(precision: str, where: Where, tmp_path: Path) -> None:
    before = WIDE.make()
    model = copy.deepcopy(before)
    ids = {name: id(p) for name, p in model.named_parameters()}
    with session(WIDE, tmp_path, where, precision, RECIPE, model=model) as used:
        assert {name: id(p) for name, p in model.named_parameters()} == ids
        weight = model.up.weight  # type: ignore[union-attr]
        assert isinstance(weight, nn.Parameter)
        assert (weight.shape, weight.ndim, weight.numel(), weight.dtype) == ((128, 32), 2, 4096, torch.float32)
        assert "shape=(128, 32)" in repr(weight)
        assert used.engine.counters.gathers <= len(used.engine.units)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before.state_dict()[name]), name
        for part in (copy.deepcopy(model), copy.deepcopy(model.up), torch.load(_saved(model), weights_only=False)):
            assert all(type(p) is nn.Parameter for p in part.parameters())  # type: ignore[union-attr]
        x = batch(0)[0]
        assert torch.equal(model.up(x), before.up(x))  # type: ignore[union-attr,operator]
        assert torch.equal(copy.deepcopy(model)(x), before(x))
        assert torch.equal(weight.float().norm(), before.up.weight.norm())  # type: ignore[union-attr,operator]


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_changes_outside_of_steps_count(precision: str, where: Where, tmp_path: Path) -> None:
    with running(tmp_path, where, precision) as (used, model):
        weight = model.up.weight
        expected = weight.detach().clone()
        for change in (
            lambda w: w.data.mul_(0.5),
            lambda w: w.data[100, 3].fill_(7.0),
            lambda w: setattr(w, "data", w.data.clamp(-0.01, 0.1)),
            lambda w: w.data[5:9].fill_(1.0),
        ):
            change(weight)
            mirror = nn.Parameter(expected)
            change(mirror)
            expected = mirror.data.clone()
            used.forward()  # a step takes changes in
            assert torch.equal(weight.detach(), expected)
        with gathered(weight), torch.no_grad():
            weight.zero_()
        assert float(weight.detach().abs().sum()) == 0
        model.load_state_dict(WIDE.make().state_dict())
        assert torch.equal(weight.detach(), WIDE.make().up.weight)
        torch.manual_seed(3)
        nn.init.normal_(weight)
        torch.manual_seed(3)
        assert torch.equal(weight.detach(), nn.init.normal_(torch.empty(128, 32)))


@pytest.mark.parametrize("where", PLACES, ids=str)
def test_other_uses_in_a_step_get_a_whole_copy(where: Where, tmp_path: Path) -> None:
    """Values and gradients are those of the whole weight; the tiles get them."""

    def loss(model: Any) -> Tensor:
        x = batch(0)[0]
        w = model.up.weight
        hidden = torch.tanh(x @ w.t() + model.up.bias)
        return (hidden @ (w * 2)).square().mean() + torch.addmm(model.up.bias[:32], x, w[:32]).mean() + w.norm()

    plain = WIDE.make()
    expected = loss(plain)
    expected.backward()
    with running(tmp_path, where, "32-true") as (used, model):
        found = used.forward(lambda: loss(model))
        used.backward(found)
        assert torch.equal(found.detach(), expected.detach())
        tiles = blocks_of(model.up.weight)
        assert tiles is not None
        grads = [used.engine.unit_of(t)[1].gradients.collect([0], keep=True)[0].grad for t in tiles.tiles]  # type: ignore[index]
        assert torch.equal(torch.cat([g.view(-1) for g in grads]), plain.up.weight.grad.view(-1))  # type: ignore[union-attr,operator]
        assert tiles.opened is None


def test_changes_inside_of_a_step(tmp_path: Path) -> None:
    """A critic's weights are clipped before they are used."""
    with running(tmp_path, precision="32-true") as (used, model):
        plain = WIDE.make()
        x = batch(0)[0]

        def loss(model: Any) -> Tensor:
            model.up.weight.data.clamp_(-0.05, 0.05)
            return model(x).square().sum()

        expected = loss(plain)
        expected.backward()
        found = used.forward(lambda: loss(model))
        used.backward(found)
        assert torch.equal(found.detach(), expected.detach())
        used.engine.flush()
        assert model.up.weight.detach().abs().max() == torch.tensor(0.05)


def test_a_gradient_that_goes_past_the_tiles_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as (used, model):

        def loss() -> Tensor:
            size = model.up.weight.data.abs().mean()
            return F.linear(batch(0)[0], model.up.weight).float().square().mean() * size

        found = used.forward(loss)
        with pytest.raises(RuntimeError, match=r"'up\.weight' is in tiles\. Its data was taken as a whole in a step"):
            used.backward(found)


def test_a_copy_is_tiled_again(tmp_path: Path) -> None:
    with session(WIDE, tmp_path / "first", PLACES[1], "32-true", RECIPE) as used:
        copied = copy.deepcopy(used.model)
        expected = used.train().losses
    with session(WIDE, tmp_path / "second", PLACES[1], "32-true", RECIPE, model=copied) as again:
        assert len(again.engine.tiled) == 2
        assert again.train().losses == expected


@pytest.mark.parametrize("where", PLACES, ids=str)
def test_gradients(where: Where, tmp_path: Path) -> None:
    with running(tmp_path, where) as (used, model):
        weight = model.up.weight
        assert weight.grad is None
        used.micro_step()
        assert weight.grad.shape == weight.shape
        with pytest.raises(RuntimeError, match=r"keeps this gradient elsewhere"):
            weight.grad.norm()
        model.zero_grad()
        assert weight.grad is None
        assert used.binding.grad_norm() == 0
        used.micro_step()
        with pytest.raises(ValueError, match=r"'up.weight' is in tiles: its gradient can be set to None only"):
            weight.grad = torch.zeros(128, 32)
        weight.requires_grad_(False)
        used.optimizer.zero_grad()
        used.micro_step()
        assert weight.grad is None
        assert not weight.requires_grad
        weight.requires_grad = True
        used.micro_step()
        assert weight.grad is not None


def test_what_would_never_run_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as (used, model):
        for register in (model.up.weight.register_hook, model.up.weight.register_post_accumulate_grad_hook):
            with pytest.raises(ValueError, match=r"'up.weight' is in tiles and gets no gradient of its own"):
                register(lambda grad: None)
        loss = used.forward()
        with pytest.raises(ValueError, match=r"'up.weight' is in tiles, whose gradients cannot be asked for"):
            torch.autograd.grad(loss, [model.up.weight])
        model.up.weight.data = torch.zeros(3, 3)
        with pytest.raises(ValueError, match=r"'up.weight' was given data of shape \(3, 3\)"):
            used.engine.flush()


def test_hooks_of_modules_run(tmp_path: Path) -> None:
    seen: list[str] = []
    with running(tmp_path) as (used, model):
        model.up.register_forward_pre_hook(lambda *a: seen.append("before"))
        model.up.register_forward_hook(lambda *a: seen.append("after"))
        model.up.register_full_backward_hook(lambda *a: seen.append("backward"))
        used.micro_step()
    assert seen == ["before", "after", "backward"]


def test_dissolving_gives_everything_back(tmp_path: Path) -> None:
    with session(WIDE, tmp_path, PLACES[1], "bf16-mixed", RECIPE) as used:
        used.train()
        model: Any = used.model
        weight, expected = model.up.weight, model.up.weight.detach().clone()
        forget(model)
        assert engine_of(model) is None
        assert model.up.weight is weight
        assert type(weight) is nn.Parameter
        assert torch.equal(weight, expected)
        assert "forward" not in model.up.__dict__
        x = batch(0)[0]
        assert torch.equal(model(x), copy.deepcopy(model)(x))
        model(x).sum().backward()
        assert weight.grad is not None


@pytest.mark.parametrize("aliased", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_slots_hold_one_tile(precision: str, aliased: bool, tmp_path: Path) -> None:
    """A model that is one layer of 16 tiles trains with a budget of one tile of its weight, to the byte."""
    outputs, inputs, tiles = 1024, 256, 16
    tile_bytes = outputs // tiles * inputs * (4 if precision == "32-true" else 2)
    layer = Case(
        lambda: nn.Sequential(nn.Linear(inputs, outputs, bias=False)),
        lambda seed: (torch.randn(4, inputs, generator=torch.Generator().manual_seed(seed)), torch.zeros(4).long()),
        tile_bytes=tile_bytes,
    )
    # Staging for state, which has nothing to do with tiles of weights, takes two pieces of 4096 elements at least.
    staging = 2 * 4096 * (8 if precision == "32-true" else 10)
    memory = MemoryConfig(host_bytes=tile_bytes + staging if aliased else None, device_bytes=tile_bytes)
    where = Where("cpu" if not aliased else "nvme", "cpu", aliased=aliased)
    io_config = IOConfig(tile_numel=4096, threads=2, backend="threads")
    with session(layer, tmp_path, where, precision, RECIPE, memory=memory, io=io_config) as used:
        ring = used.engine.context.ring
        assert ring.budget == tile_bytes
        used.train()
        used.engine.flush()
        assert len(used.engine.tiled[0].tiles) == tiles
        assert used.engine.counters.overcommits == 0
        assert used.engine.counters.refills == 0
        assert ring.peak == tile_bytes
        assert used.model[0].weight.numel() * (4 if precision == "32-true" else 2) == tiles * tile_bytes  # type: ignore[index,operator]


def config(folder: Path, tiling: TilingConfig, **more: Any) -> PartitionConfig:
    return PartitionConfig(CPU, "32-true", "nvme", "cpu", str(folder), tiling=tiling, **more)


class Refused(nn.Module):
    """One of each that cannot be tiled."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(32, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.grouped = nn.Conv1d(32, 64, 3, groups=2)
        self.clipped = nn.Embedding(64, 32, max_norm=1.0)
        self.free = nn.Parameter(torch.randn(64, 64))
        self.hooked = nn.Linear(32, 32)
        self.hooked.weight.register_hook(lambda grad: grad)
        self.fine = nn.Linear(32, 32)


def test_what_cannot_be_tiled_is_named(tmp_path: Path) -> None:
    model = Refused()
    with pytest.warns(UserWarning, match=r"larger than tiling.max_tile_bytes = 0.00 MiB cannot be tiled") as told:
        engine = partition(model, config(tmp_path, TilingConfig(2048)))
    engine.context.close()
    assert [t.name for t in engine.tiled] == ["fine.weight"]
    assert len(told) == 1
    text = str(told[0].message)
    for name, reason in {
        "rnn.weight_ih_l0": "it is 'weight_ih_l0' of LSTM 'rnn', which computes with it in a way of its own",
        "attention.in_proj_weight": "it is 'in_proj_weight' of MultiheadAttention 'attention'",
        "attention.out_proj.weight": "projection of a MultiheadAttention",
        "normed.parametrizations.weight.original1": "computes with it in a way of its own",
        "grouped.weight": "has 2 groups",
        "clipped.weight": "has max_norm",
        "free": "it is 'free' of Refused",
        "hooked.weight": "hooks of its own (_backward_hooks)",
    }.items():
        assert re.search(re.escape(name) + r" \(\d\.\d\d MiB\): .*" + re.escape(reason), text), (name, text)


def test_many_refusals_are_one_short_warning(tmp_path: Path) -> None:
    model = nn.Module()
    model.many = nn.ParameterList([torch.randn(32, 32) for _ in range(30)])
    with pytest.warns(UserWarning, match=r"30 parameters .* and 20 more"):
        partition(model, config(tmp_path, TilingConfig(2048))).context.close()


def test_nothing_is_tiled_unless_asked_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), TiledLinear(32, 64, out_splits=4), TiledEmbedding(64, 32, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = partition(model, config(tmp_path, TilingConfig()))
    assert {t.name: len(t.tiles) for t in engine.tiled} == {"1.weight": 4, "2.weight": 2}
    x = torch.randn(3, 32)
    assert model[1](x).shape == (3, 64)
    engine.context.close()


def test_auto_takes_what_slots_have_room_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.Linear(1024, 8))
    memory = MemoryConfig(host_bytes=1_500_000)
    engine = partition(model, config(tmp_path, TilingConfig("auto"), memory=memory))
    (tiled,) = engine.tiled
    limit = 1_500_000 // 3 // 5
    assert [t.shape for t in tiled.tiles] == [(32, 512)] * 32  # 48 rows would fit
    assert limit // (512 * 4) == 48
    assert engine.context.ring.budget >= 5 * 32 * 512 * 4
    engine.context.close()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "max"])
def test_options_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"tiling.max_tile_bytes must be a positive whole number of bytes or None or"):
        TilingConfig(value)


def test_units_beside_tiles(tmp_path: Path) -> None:
    """Tiles are units of their own, and what is left of a layer joins its surroundings."""
    model = Conv1Ds()
    engine = partition(model, config(tmp_path, TilingConfig(2048)))
    names = [unit.name for unit in engine.units]
    assert names[-1] == ""
    assert {n.partition("[")[0] for n in names[:-1]} == {
        "embed.weight", "up.weight", "down.weight", "point.weight", "wide.weight",
    }  # fmt: skip
    assert engine.unit_of(model.up.bias) is not None
    assert engine.unit_of(model.up.weight) is None
    assert len(engine.places_of(model.up.weight)) == len(engine.tiled[1].tiles)
    assert isinstance(model.up, Conv1D)
    engine.context.close()


def test_one_of_tied_uses_by_hand(tmp_path: Path) -> None:
    """A head that is no module: ``F.linear(x, embedding.weight)``."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(48, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.embed(ids)), self.embed.weight)

    case = Case(Tied, lambda seed: (torch.arange(8), torch.arange(8)), tile_bytes=2048)
    with session(case, tmp_path, PLACES[1], "32-true", RECIPE) as used:
        expected = case.loss(case.make(), case.batch(0), 0)
        assert torch.equal(used.forward().detach(), expected.detach())
        used.train()
        assert used.engine.counters.refills == 0


def test_a_limit_that_is_meant_in_other_units_is_told() -> None:
    with pytest.warns(UserWarning, match="cut into 5,000 tiles.* counts bytes .* and 4 are given"):
        plan_tiles(nn.Linear(1, 5000, bias=False), 4, lambda p: 4)
