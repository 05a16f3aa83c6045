"""What goes wrong is said, and what comes after is right again."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Session, Where, least_memory, session, train_paged
from models import ZOO, Case, mlp, vectors
from oracle import Recipe, assert_same
from torch import Tensor, nn

from lightning_zinf.config import IOConfig
from lightning_zinf.memory.nvme import Extent

HOST = Where("nvme", "nvme", tight=True)
DEVICE = Where("nvme", "nvme", aliased=False, tight=True)
RECIPE = Recipe(steps=3)


class Refused:
    """A request that the drive refused."""

    def __init__(self, extent: Extent) -> None:
        self._path = extent.volume.files[0].path

    def wait(self, timeout: float | None = None) -> int:
        raise OSError(errno.EIO, "Input/output error", self._path)

    def done(self) -> bool:
        return True


class Slow:
    """A request that takes its time to be waited for, and is rarely known to be done before."""

    def __init__(self, ticket: Any, noise: random.Random) -> None:
        self._ticket, self._noise = ticket, noise

    def wait(self, timeout: float | None = None) -> int:
        time.sleep(self._noise.random() * 0.003)
        return int(self._ticket.wait(timeout))

    def done(self) -> bool:
        return self._noise.random() < 0.3 and bool(self._ticket.done())


@contextmanager
def small_tiles(folder: Path, where: Where, precision: str, name: str = "gpt") -> Iterator[Session]:
    """Have most units' weights on disk, and their state in several tiles."""
    case, io = ZOO[name], IOConfig(tile_numel=4096, threads=2, backend="threads")
    memory = least_memory(case, precision)
    with session(case, folder, where, precision, RECIPE, memory=memory, io=io) as running:
        yield running


def is_weights(running: Session, extent: Extent, offset: int) -> bool:
    return any(b.weights.extent is extent for u in running.engine.units for b in u.buffers)


def is_first_tile(running: Session, extent: Extent, offset: int) -> bool:
    return offset == 0 and not is_weights(running, extent, offset)


def is_later_tile(running: Session, extent: Extent, offset: int) -> bool:
    return offset > 0 and not is_weights(running, extent, offset)


Which = Callable[[Session, Extent, int], bool]


def refuse(running: Session, operation: str, which: Which, number: int) -> Callable[[], int]:
    """Let the ``number``-th request of a kind fail, and return how many there have been."""
    store = running.engine.context.nvme
    original, seen = getattr(store, operation), 0

    def request(extent: Extent, tensor: Tensor, offset: int = 0) -> Any:
        nonlocal seen
        if which(running, extent, offset):
            seen += 1
            if seen == number + 1:
                if operation == "read":
                    tensor.view(torch.uint8).fill_(0xA5)  # what came of it is not to be used
                return Refused(extent)
        return original(extent, tensor, offset)

    setattr(store, operation, request)
    return lambda: seen


def attempt(running: Session) -> bool:
    """Take a step; if it fails on a file, get ready to begin it anew."""
    number, losses = running.number, list(running.losses)
    try:
        running.step()
    except OSError as error:
        running.engine.reset()
        running.number, running.losses = number, losses
        return not error.filename  # an error that does not tell where is as good as none
    return True


def go_through_a_failed_read(where: Where, precision: str, which: Which, number: int, folder: Path) -> None:
    expected = train_paged(ZOO["gpt"], folder / "undisturbed", where, precision, RECIPE)
    with small_tiles(folder, where, precision) as running:
        count = refuse(running, "read", which, number)
        attempts = [attempt(running) for _ in range(RECIPE.steps + 1)]
        assert count() > number, "there are fewer reads: nothing was tested"
        assert attempts.count(False) == 1
        assert_same(running.result(), expected)


@pytest.mark.parametrize("number", [0, 1, 4, 7, 10])
@pytest.mark.parametrize("which", [is_weights, is_first_tile])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("where", [HOST, DEVICE], ids=str)
def test_a_failed_read_surfaces_and_the_run_goes_on(
    where: Where, precision: str, which: Which, number: int, tmp_path: Path
) -> None:
    go_through_a_failed_read(where, precision, which, number, tmp_path)


@pytest.mark.parametrize("number", [0, 3, 7])
@pytest.mark.parametrize("where", [HOST, DEVICE], ids=str)
def test_a_failed_read_amid_an_update_surfaces_and_the_run_goes_on(where: Where, number: int, tmp_path: Path) -> None:
    go_through_a_failed_read(where, "32-true", is_later_tile, number, tmp_path)


@pytest.mark.parametrize("number", [0, 3, 6, 11])
@pytest.mark.parametrize("which", [is_weights, is_first_tile, is_later_tile])
@pytest.mark.parametrize("where", [HOST, DEVICE], ids=str)
def test_a_failed_write_never_passes_silently(where: Where, which: Which, number: int, tmp_path: Path) -> None:
    with small_tiles(tmp_path, where, "bf16-mixed") as running:
        count = refuse(running, "write", which, number)
        with pytest.raises(OSError, match="Input/output error") as caught:
            running.train().engine.flush()
        assert count() > number
        assert caught.value.filename


@pytest.mark.parametrize("where", [HOST, DEVICE], ids=str)
def test_weights_that_could_not_be_written_are_never_read_as_they_were_before(where: Where, tmp_path: Path) -> None:
    """Whoever catches the first error and goes on is told again at each use, until they are written anew."""
    with small_tiles(tmp_path, where, "bf16-mixed") as running:
        engine = running.engine
        unit = next(u for u in engine.units if all(b.weights.extent is not None for b in u.buffers))
        buffer = unit.buffers[0]

        def crowd_out() -> int:
            told = 0
            for _ in range(2):
                for other in engine.units:
                    try:
                        with engine.loaded(other) if other is not unit else nullcontext():
                            pass
                    except OSError:
                        told += 1
            assert not buffer.weights.at_hand
            return told

        with engine.loaded(unit):
            values = buffer.weights.flat().clone()
        refuse(running, "write", lambda _, extent, offset: extent is buffer.weights.extent, 0)
        with engine.loaded(unit):
            buffer.weights.store()
        assert crowd_out() == 1
        told_again = rf"Input/output error: the weights of '{buffer.name}' .* out of date"
        for _ in range(3):
            with pytest.raises(OSError, match=told_again) as it, engine.loaded(unit):
                pass
            assert it.value.errno == errno.EIO
            assert it.value.filename
        with torch.no_grad():
            buffer.weights.claim()
            buffer.weights.flat().copy_(values + 1)
            buffer.weights.store()
            buffer.weights.leave()
        assert crowd_out() == 0
        with engine.loaded(unit):
            assert torch.equal(buffer.weights.flat(), values + 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("where", [HOST, DEVICE], ids=str)
@pytest.mark.parametrize("name", ["gpt", "mixture"])
def test_slow_requests_change_no_bit(name: str, where: Where, seed: int, tmp_path: Path) -> None:
    expected = train_paged(ZOO[name], tmp_path / "undisturbed", where, "bf16-mixed", RECIPE)
    noise = random.Random(seed)
    with small_tiles(tmp_path, where, "bf16-mixed", name) as running:
        store = running.engine.context.nvme
        for operation in ("read", "write"):
            original = getattr(store, operation)
            setattr(store, operation, lambda *args, original=original: Slow(original(*args), noise))
        assert_same(running.train().result(), expected)


class Mishap(Exception):
    pass


class Trip(torch.autograd.Function):
    """The identity, which fails on its turn in forward or in backward."""

    raise_in: str | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if Trip.raise_in == "forward":
            Trip.raise_in = None
            raise Mishap
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Trip.raise_in == "backward":
            Trip.raise_in = None
            raise Mishap
        return grad


class Tripping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Trip.apply(x)
        return out


def tripping() -> nn.Module:
    layers = list(mlp())
    return nn.Sequential(*layers[:7], Tripping(), *layers[7:])


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("raise_in", ["forward", "backward"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("where", [HOST, DEVICE, Where("none", "nvme"), Where("none", "none", aliased=False)], ids=str)
def test_training_goes_on_after_an_exception_in_user_code(
    where: Where, precision: str, raise_in: str, at: int, tmp_path: Path
) -> None:
    case = Case(tripping, vectors)
    expected = train_paged(case, tmp_path / "undisturbed", where, precision, RECIPE)
    with session(case, tmp_path, where, precision, RECIPE) as running:
        running.train(at)
        number, losses = running.number, list(running.losses)
        Trip.raise_in = raise_in
        with pytest.raises(Mishap):
            running.step()
        running.engine.reset()
        running.number, running.losses = number, losses
        assert_same(running.train(RECIPE.steps - at).result(), expected)
