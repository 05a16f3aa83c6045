"""Activation checkpointing and offloading of what autograd saves: the bits of training without, and the bytes."""

from __future__ import annotations

import copy
import errno
import functools
import inspect
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_cases import RECOMPUTE, Storages, ways, what_plain_autograd_saves
from driver import Session, Where, session
from models import LENGTH, WIDTH, ZOO, Block, Case, vectors
from oracle import Recipe, Result, assert_same
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_zinf.memory.activations import ActivationStore

RECIPE = Recipe(steps=3)
ONCE = Recipe(accumulate=1, steps=2)
FAST = ["gpt"]
AWAY = [
    Where(recompute=True, activations="nvme", activation_bytes=8192),
    Where(activations="nvme", activation_bytes=40960),
    Where("nvme", "nvme", tight=True, recompute=True, activations="nvme", activation_bytes=8192),
    Where("nvme", "nvme", aliased=False, tight=True, recompute=True, activations="nvme", activation_bytes=8192),
    Where("cpu", "cpu", aliased=False, tight=True, activations="cpu"),
]
TREATED = [Where(recompute=True), *AWAY]


def described(where: Where) -> str:
    how = "recompute-" * bool(where.recompute) + where.activations
    return f"{where}-{how}" + (f"-{where.activation_bytes}" if where.activation_bytes else "")


everywhere = pytest.mark.parametrize("where", AWAY, ids=described)
treated = pytest.mark.parametrize("where", TREATED, ids=described)


def store_of(running: Session) -> ActivationStore:
    store = running.engine.context.activations
    assert store is not None
    return store


def nothing_left(running: Session) -> bool:
    store = running.engine.context.activations
    if store is None:
        return True
    store.drain()
    return store.live == 0 and store.resting_bytes == 0


@functools.cache
def untreated(name: str, precision: str, folder: Path) -> tuple[Result, list[Tensor]]:
    return trained(name, precision, Where(), folder)


def trained(name: str, precision: str, where: Where, folder: Path) -> tuple[Result, list[Tensor]]:
    with session(ZOO[name], folder, where, precision, RECIPE) as running:
        running.train()
        assert nothing_left(running)
        return running.result(), [b.clone() for b in running.model.buffers()]


def check_bits(name: str, precision: str, where: Where, folder: Path) -> None:
    found, buffers = trained(name, precision, where, folder)
    expected, expected_buffers = untreated(name, precision, folder.parent)
    assert_same(found, expected)
    for ours, theirs in zip(buffers, expected_buffers, strict=True):  # of BatchNorm: changed once
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "where"), [(n, w) for n in FAST for w in ways(n)], ids=str)
def test_the_bits_of_training_without(name: str, where: Where, tmp_path: Path) -> None:
    check_bits(name, "bf16-mixed", where, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "where"),
    [
        (name, precision, where)
        for row, name in enumerate(ZOO)
        for column, where in enumerate(ways(name))
        for precision in (("32-true", "bf16-mixed", "16-mixed")[(row + column) % 3],)  # each with each other
        if (name, precision) != ("bfloat16-born", "16-mixed")  # torch has no such LayerNorm
    ],
    ids=str,
)
def test_the_bits_of_training_without_on_every_model(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    check_bits(name, precision, where, tmp_path)


# ---------------------------------------------------------------------- bytes


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("slots", [2, 3, 5, 100])
def test_every_input_of_a_block_goes_and_comes_once(slots: int, precision: str, tmp_path: Path) -> None:
    """One micro-step writes the inputs of the blocks, and reads what staging has not kept."""
    plain, _ = what_plain_autograd_saves(ZOO["gpt"], precision, is_block)
    one = 4 * 8 * WIDTH * 4
    assert plain.inputs.padded == 3 * one
    where = Where(recompute=True, activations="nvme", activation_bytes=slots * one)
    with session(ZOO["gpt"], tmp_path, where, precision, ONCE) as running:
        for _ in range(3):
            before = running.engine.counters.snapshot()
            running.step()
            moved = running.engine.counters.since(before)
            assert moved["activation_write_bytes"] == moved["nvme_write_bytes"] == 3 * one
            assert moved["activation_reused_bytes"] == min(slots, 3) * one
            assert moved["activation_read_bytes"] == moved["nvme_read_bytes"] == max(0, 3 - slots) * one
            assert moved["overcommits"] == moved["orphaned_slots"] == 0
        assert store_of(running).staging.peak <= slots * one  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "precision"),
    [("mlp", "32-true"), ("gpt", "32-true"), ("lstm", "32-true"), ("cnn", "32-true"), ("gpt", "bf16-mixed")],
)
def test_without_recomputation_every_storage_goes_once(name: str, precision: str, tmp_path: Path) -> None:
    plain, _ = what_plain_autograd_saves(ZOO[name], precision, lambda module: False)
    with session(ZOO[name], tmp_path, Where(activations="nvme"), precision, ONCE) as running:
        # Autocast casts the oracle's float32 weights, and autograd saves the copies; ours are bfloat16 already.
        expected = plain.beside.padded if precision == "32-true" else saved_by_the_engine(running)
        before = running.engine.counters.snapshot()
        running.step()
        moved = running.engine.counters.since(before)
        assert moved["activation_write_bytes"] == moved["nvme_write_bytes"] == expected
        assert moved["activation_reused_bytes"] >= expected  # all of it fits into staging
        assert moved["activation_read_bytes"] == 0


def saved_by_the_engine(running: Session) -> int:
    """Return the padded bytes that autograd saves of the engine's own model, without weights and buffers."""
    found = Storages()
    lasting = {b.storage_key() for u in running.engine.units for b in u.buffers}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in lasting:
            found.add(tensor)
        return tensor

    offload, running.engine._net.offload = running.engine._net.offload, None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        running.forward()
    running.engine._net.offload = offload
    return found.padded


@contextmanager
def on_looker(running: Session) -> Iterator[Storages]:
    """See what the engine leaves to the hooks that were there before, and what blocks are given."""
    found = Storages()
    lasting = {b.storage_key() for u in running.engine.units for b in u.buffers}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in lasting:
            found.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def test_what_stays_alive_is_what_the_formula_says(tmp_path: Path) -> None:
    """Between forward and backward: everything; inputs of blocks and what is saved beside them; the latter alone."""
    plain, _loss = what_plain_autograd_saves(ZOO["gpt"], "32-true", is_block)
    shared = plain.beside.sizes.keys() & plain.inputs.sizes.keys()
    assert not shared
    beside = sum(plain.beside.sizes.values())
    assert sum({**plain.within.sizes, **plain.beside.sizes}.values()) > 5 * beside
    expected = {
        Where(): sum({**plain.within.sizes, **plain.beside.sizes}.values()),
        Where(recompute=True): sum({**plain.inputs.sizes, **plain.beside.sizes}.values()),
        Where(recompute=True, activations="nvme"): beside,
        Where(activations="nvme"): 0,
    }
    for where, nbytes in expected.items():
        with session(ZOO["gpt"], tmp_path, where, "32-true", ONCE) as running, on_looker(running) as found:
            loss = running.forward()
            assert sum(found.sizes.values()) == nbytes, where
            del loss


@treated
def test_memory_of_what_is_away_is_free(where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, "32-true", ONCE) as running:
        inputs: list[StorageWeakRef] = []

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(StorageWeakRef(args[0].untyped_storage()))

        for block in running.model.blocks:  # type: ignore[union-attr]
            block.register_forward_pre_hook(look)
        loss = running.forward()
        assert [ref.expired() for ref in inputs] == 3 * [where.activations != "none"]
        running.backward(loss)


@everywhere
def test_the_budget_holds_and_order_does_not_matter(where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, "32-true", RECIPE) as running:
        running.train()
        store = store_of(running)
        if store.nvme is not None:
            assert store.staging.peak <= store.budget  # type: ignore[union-attr]
        assert running.engine.counters.overcommits == running.engine.counters.orphaned_slots == 0
        assert nothing_left(running)


# ---------------------------------------------------------------------- autograd


class Odd(nn.Module):
    """A block with keyword arguments, nested inputs, several outputs and a constant among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor, plus: float = 1.0) -> tuple[Any, ...]:
        x, y = pair
        a = torch.tanh(self.first(x) * scale + plus)
        return a, {"y": self.second(y).exp() * a}, plus


class OddNet(nn.Module):
    """One block called twice, and one that changes its own copy in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Odd() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in [self.blocks[0], self.blocks[1], self.blocks[0]]:
            x, rest, plus = block((x, 0.1 * y), scale=self.scale, plus=0.5)
            assert plus == 0.5
            y = rest["y"].clamp(-3, 3)
        out: Tensor = self.out(x + y)
        return out


ODD = Case(OddNet, vectors)


@treated
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_keywords_tuples_and_blocks_called_twice(where: Where, precision: str, tmp_path: Path) -> None:
    with session(ODD, tmp_path, Where(), precision, RECIPE) as running:
        expected = running.train().result()
    with session(ODD, tmp_path, where, precision, RECIPE) as running:
        assert_same(running.train().result(), expected)
        assert nothing_left(running)


class Gates(nn.Module):
    """As in an LSTM: pieces of one storage, each changed in place under a version counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.inner(x).unsafe_chunk(4, -1)
        return torch.cat([a.sigmoid_(), b.tanh_(), c.sigmoid_(), d.relu_()], -1)


GATES = Case(lambda: nn.Sequential(*(Gates() for _ in range(3)), nn.Linear(WIDTH, 10)), vectors)


@treated
def test_pieces_of_a_storage_with_counters_of_their_own(where: Where, tmp_path: Path) -> None:
    with session(GATES, tmp_path, Where(), "32-true", ONCE) as running:
        expected = running.train().result()
    with session(GATES, tmp_path, where, "32-true", ONCE) as running:
        assert_same(running.train().result(), expected)
        assert nothing_left(running)


@treated
def test_backward_twice_and_several_losses(where: Where, tmp_path: Path) -> None:
    case = ZOO["gpt"]

    def run(where: Where) -> list[Tensor]:
        with session(case, tmp_path, where, "32-true", ONCE) as running:
            loss = running.forward()
            with running.engine.frame("train") as outputs:
                other = case.loss(running.model, case.batch(5), 5)
                outputs.append(other)
            for last in (False, True):
                for each in (loss, other) if last else (other, loss):
                    running.engine.before_backward()
                    each.backward(retain_graph=not last)
                    running.engine.after_backward()
            del loss, other, each, outputs
            assert nothing_left(running)
            running.update()
            return list(running.result().masters.values())

    for ours, theirs in zip(run(where), run(Where()), strict=True):
        assert torch.equal(ours, theirs)


@treated
def test_second_derivatives(where: Where, tmp_path: Path) -> None:
    def run(where: Where) -> Result:
        with session(ZOO["attention"], tmp_path, where, "32-true", ONCE) as running:
            model = running.model
            with running.engine.frame("train") as outputs, torch.nn.attention.sdpa_kernel(MATH):
                torch.manual_seed(0)
                hidden = model.embed(ZOO["attention"].batch(0)[0])  # type: ignore[operator,union-attr]
                loss = model.out(model.encoder(hidden)).float().square().mean()  # type: ignore[operator,union-attr]
                outputs.append(loss)
            running.engine.before_backward()
            with torch.nn.attention.sdpa_kernel(MATH):
                (slope,) = torch.autograd.grad(loss, hidden, create_graph=True)
            running.engine.after_backward()
            with torch.nn.attention.sdpa_kernel(MATH):
                running.backward(slope.square().sum())
            del loss, slope, hidden, outputs
            assert nothing_left(running)
            running.update()
            return running.result()

    assert_same(run(where), run(Where()))


MATH = torch.nn.attention.SDPBackend.MATH


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(0.5)) + 1.0


def fresh_vectors(seed: int) -> tuple[Tensor, ...]:
    x, y = vectors(seed)
    return x.clone(), y


CHANGING = Case(lambda: nn.Sequential(*(Changing() for _ in range(3)), nn.Linear(WIDTH, 10)), fresh_vectors)


@treated
def test_a_block_that_changes_its_input_in_place(where: Where, tmp_path: Path) -> None:
    """Plain autograd allows it here. Recomputing from the changed input would be wrong: refused, or there is a copy."""
    with session(CHANGING, tmp_path, Where(), "32-true", ONCE) as running:
        expected = running.train().result()
    with session(CHANGING, tmp_path, where, "32-true", ONCE) as running:
        if where.recompute and where.activations == "none":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                running.train()
        else:
            assert_same(running.train().result(), expected)


@pytest.mark.parametrize("where", [Where("nvme", "nvme", tight=True), *AWAY], ids=described)
def test_a_saved_tensor_that_is_changed_is_refused_or_was_copied(where: Where, tmp_path: Path) -> None:
    """Autograd leaves the check to hooks: the net must not let wrong gradients pass."""

    def loss(model: nn.Module, batch: Any, step: int) -> Tensor:
        out = model(*batch[:-1]).exp()
        result = out.sum()
        out.add_(1)
        return result

    case = Case(ZOO["gpt"].build, ZOO["gpt"].batch, loss)
    plain = case.make()
    case_loss = plain(*case.batch(0)[:-1]).exp().sum()
    case_loss.backward()
    with session(case, tmp_path, where, "32-true", ONCE) as running:
        if where.recompute or where.activations == "none":  # the loss is beside the blocks: it stays
            with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version"):
                running.micro_step()
            running.engine.reset()
        else:
            running.micro_step()
            for name, param in running.model.named_parameters():
                owner = running.engine.unit_of(param)
                assert owner is not None
                if running.engine.context.aliased:
                    assert torch.equal(param.grad, dict(plain.named_parameters())[name].grad)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the module stays what it is


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
