"""Activation checkpointing and offloading: the module stays what it is, options, and what goes wrong."""

from __future__ import annotations

import copy
import errno
import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_cases import (
    AWAY,
    ONCE,
    RECOMPUTE,
    TREATED,
    described,
    nothing_left,
    store_of,
    treated,
    what_plain_autograd_saves,
)
from driver import Where, session
from models import LENGTH, WIDTH, ZOO
from oracle import Recipe, assert_same


def test_modules_stay_what_they_are(tmp_path: Path) -> None:
    plain = ZOO["gpt"].make()
    with session(ZOO["gpt"], tmp_path, Where(recompute=True), "32-true", ONCE) as running:
        model, calls = running.model, []
        assert list(model.state_dict()) == list(plain.state_dict())
        for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
            assert type(ours) is type(theirs)
            assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
        model.blocks[1].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
        running.micro_step()
        assert calls == [1]  # not again in the recomputation
        running.engine.dissolve()
        for module in model.modules():
            assert "forward" not in module.__dict__


@treated
def test_copies_and_pickles_are_plain_models(where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, "32-true", ONCE) as running:
        running.train(1)
        buffer = io.BytesIO()
        torch.save(running.model, buffer)
        buffer.seek(0)
        ids = ZOO["gpt"].batch(3)[0]
        with torch.no_grad():
            expected = running.model(ids)
        for twin in (copy.deepcopy(running.model), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(ids), expected)
            twin.train()
            twin(ids).sum().backward()
            assert all(p.grad is not None for p in twin.parameters())
            assert (
                twin.blocks[0].forward.__self__ is twin.blocks[0]
                if hasattr(  # its own weights, not ours
                    twin.blocks[0].forward, "__self__"
                )
                else twin.blocks[0].forward._module is twin.blocks[0]
            )
        assert nothing_left(running)


def test_only_training_steps_recompute(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, Where(recompute=True, activations="nvme"), "32-true", ONCE) as running:
        running.train(1)
        before, batch = running.engine.counters.activation_write_bytes, ZOO["gpt"].batch(3)
        running.model.eval()
        with torch.no_grad():
            running.forward(kind="validate")
        running.forward(kind="validate")
        running.model.train()
        with torch.no_grad():
            running.forward()
        ZOO["gpt"].loss(running.model, batch, 0)
        assert running.engine.counters.activation_write_bytes == before
        assert nothing_left(running)


def test_modes_and_buffers_are_those_of_the_forward(tmp_path: Path) -> None:
    """``model.eval()`` between forward and backward must not drop dropout, nor a second forward move statistics."""
    for name in ("encoder-decoder", "cnn"):
        results = []
        for where in (Where(), Where(recompute=RECOMPUTE.get(name, True))):
            with session(ZOO[name], tmp_path, where, "32-true", ONCE) as running:
                loss = running.forward()
                other = running.forward()
                running.model.eval()
                running.backward(loss)
                running.model.train()
                running.backward(other)
                running.update()
                results.append((running.result(), [b.clone() for b in running.model.buffers()]))
        assert_same(results[1][0], results[0][0])
        for ours, theirs in zip(results[1][1], results[0][1], strict=True):
            assert torch.equal(ours, theirs)


def test_a_unit_without_gradients_saves_nothing(tmp_path: Path) -> None:
    """The frozen first half of the model: nothing flows back through it."""
    where = Where(recompute=("Linear",), activations="nvme")
    with session(ZOO["frozen"], tmp_path, where, "32-true", ONCE) as running:
        running.step()
        one = 4096  # of 4 x 32 elements
        assert running.engine.counters.activation_write_bytes == 3 * one  # the last three of five layers


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("recompute", "match"),
    [
        (("Blok",), "no module of class 'Blok'"),
        ((), "names no class"),
        (True, "units that are made of several modules"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(recompute: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match), session(ZOO["mlp"], tmp_path, Where(recompute=recompute)):
        pass


def test_small_tensors_stay(tmp_path: Path) -> None:
    from lightning_zinf.config import MemoryConfig, PartitionConfig
    from lightning_zinf.engine.partition import partition

    config = PartitionConfig(
        torch.device("cpu"),
        nvme_paths=(str(tmp_path),),
        memory=MemoryConfig(activation_min_bytes=4 * LENGTH * 2 * WIDTH * 4),
        offload_activations="nvme",
    )
    model = ZOO["gpt"].make()
    engine = partition(model, config, model.parameters())
    plain, _ = what_plain_autograd_saves(ZOO["gpt"], "32-true", lambda module: False)
    with engine.frame("train") as outputs:
        outputs.append(ZOO["gpt"].loss(model, ZOO["gpt"].batch(0), 0))
    large = [nbytes for nbytes in plain.beside.sizes.values() if nbytes >= 4 * LENGTH * 2 * WIDTH * 4]
    assert 0 < len(large) < len(plain.beside.sizes)
    assert engine.counters.activation_write_bytes == sum(-(-nbytes // 4096) * 4096 for nbytes in large)
    engine.context.close()


# ---------------------------------------------------------------------- what goes wrong


class Interrupted(Exception):
    pass


def interrupt(*_: object) -> None:
    raise Interrupted


@pytest.mark.parametrize("where", [TREATED[0], TREATED[3], TREATED[5]], ids=described)
@pytest.mark.parametrize("moment", ["forward", "backward", "recomputation"])
def test_training_goes_on_after_an_exception(where: Where, moment: str, tmp_path: Path) -> None:
    recipe = Recipe(accumulate=1, steps=4)
    with session(ZOO["gpt"], tmp_path, Where(), "bf16-mixed", recipe) as running:
        expected = running.train().result()
    with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", recipe) as running:
        running.train(2)
        block, before, count = running.model.blocks[1], running.number, [0]  # type: ignore[union-attr]

        def in_backward(*_: object) -> None:
            count[0] += 1
            if moment == "forward" or count[0] == 2:
                raise Interrupted

        if moment == "backward" or (moment == "recomputation" and not where.recompute):
            handle = block.register_full_backward_hook(interrupt)
        else:
            handle = block.up.register_forward_hook(in_backward)
        with pytest.raises(Interrupted):
            running.step()
        handle.remove()
        running.engine.reset()
        assert nothing_left(running)
        running.number, running.losses = before, running.losses[:before]
        running.train(2)
        assert_same(running.result(), expected)


class Refused:
    """A request that the drive refused."""

    def wait(self, timeout: float | None = None) -> int:
        raise OSError(errno.EIO, "Input/output error", "zinf.state")

    def done(self) -> bool:
        return True


@pytest.mark.parametrize("what", ["read", "write"])
@pytest.mark.parametrize("where", [w for w in AWAY if w.activations == "nvme"], ids=described)
def test_a_disk_that_fails_is_named(where: Where, what: str, tmp_path: Path) -> None:
    recipe = Recipe(accumulate=1, steps=4)
    with session(ZOO["gpt"], tmp_path, Where(), "32-true", recipe) as running:
        expected = running.train().result()
    with session(ZOO["gpt"], tmp_path, where, "32-true", recipe) as running:
        running.train(2)
        before, store = running.number, store_of(running).nvme
        assert store is not None
        working, count = getattr(store, what), [0]

        def failing(*arguments: Any) -> Any:
            count[0] += 1
            return Refused() if count[0] == 1 else working(*arguments)

        setattr(store, what, failing)
        with pytest.raises(OSError, match=r"activations could not be .*nvme_path") as caught:
            running.step()
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == "zinf.state"
        assert count[0] >= 1
        setattr(store, what, working)
        del caught
        running.engine.reset()
        assert nothing_left(running)
        running.number, running.losses = before, running.losses[:before]
        running.train(2)
        assert_same(running.result(), expected)
