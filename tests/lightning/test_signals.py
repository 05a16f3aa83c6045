"""Signal handlers during training: put off to the next batch, on all ranks alike."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_cases import Net, assert_same, loader, net, trainer, weights, zinf
from torch import Tensor

import lightning_zinf
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.signals import _CELL, GRACE, LEFT_ALONE, TOGETHER, DeferredSignals, due

SHARDED = {"offload_params": "nvme", "offload_optimizer": "nvme", "state_dict_type": "sharded"}
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Leave the process as it was."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert {type(handler) for handler in after.values()} & {DeferredSignals} == set()


def told(*ranks: dict[int, float]) -> list[bytes]:
    return [b"".join(_CELL.pack(number, since) for number, since in rank.items()) for rank in ranks]


def test_what_is_due() -> None:
    assert due(told({})) == due(told({}, {})) == []
    assert due(told({12: 0.0, 10: 3.0})) == [10, 12]
    assert due(told({10: 0.0}, {})) == []
    assert due(told({10: 0.0}, {}), last=True) == [10]
    assert due(told({10: GRACE}, {})) == [10]
    assert due(told({10: 0.0, 12: 1.0}, {12: 0.5})) == [12]


@given(st.lists(st.dictionaries(st.integers(1, 64), st.floats(0, 2 * GRACE)), min_size=1, max_size=4))
def test_all_that_every_rank_has_is_due_and_nothing_that_none_has(ranks: list[dict[int, float]]) -> None:
    found = due(told(*ranks))
    assert set.intersection(*map(set, ranks)) <= set(found) <= set(due(told(*ranks), last=True)) == set().union(*ranks)
    assert found == sorted(found)
    assert all(
        max(rank.get(number, 0.0) for rank in ranks) >= GRACE for number in set(found) - set(ranks[0]) - TOGETHER
    )


def test_handlers_wait_and_come_back() -> None:
    calls: list[int] = []
    others: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: calls.append(number))
    untouched = {number: signal.getsignal(number) for number in LEFT_ALONE}
    installed = signal.getsignal(signal.SIGUSR1)
    deferred = DeferredSignals()
    assert {number: signal.getsignal(number) for number in LEFT_ALONE} == untouched
    for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert calls == []
    deferred.handle([deferred.tell()])
    assert calls == [signal.SIGUSR1, signal.SIGUSR2]  # each once, as the system does
    deferred.handle([deferred.tell()])
    assert len(calls) == 2
    signal.signal(signal.SIGUSR1, lambda number, frame: others.append(number))  # installed in the midst of training
    deferred.handle([deferred.tell()])
    os.kill(os.getpid(), signal.SIGUSR1)
    assert others == []
    deferred.handle([deferred.tell()])
    assert others == [signal.SIGUSR1]
    signal.signal(signal.SIGUSR1, installed)
    deferred.release()
    assert signal.getsignal(signal.SIGUSR1) is installed
    os.kill(os.getpid(), signal.SIGUSR2)
    assert calls[2:] == [signal.SIGUSR2]


def test_a_signal_that_only_some_ranks_have(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    deferred = DeferredSignals()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        deferred.handle([deferred.tell(), b""])
        assert calls == []
        deferred.handle([deferred.tell(), b""], last=True)
        assert calls == [signal.SIGUSR1]
        assert "SIGUSR1 came to 1 of 2 ranks: its handler runs on those alone" in caplog.text
        deferred.handle([b"", *told({signal.SIGUSR1: 2 * GRACE})])  # it came to the other one
        assert calls == [signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        deferred.release()
    assert "training ended before the handlers of these signals could run: SIGUSR1" in caplog.text
    assert calls == [signal.SIGUSR1]


def test_handlers_that_call_the_one_before(caplog: pytest.LogCaptureFixture) -> None:
    """As libraries do which install theirs in the midst of training: both run, once for each signal."""
    calls: list[str] = []
    signal.signal(signal.SIGUSR1, lambda *_: calls.append("first"))
    deferred = DeferredSignals()
    before = signal.getsignal(signal.SIGUSR1)
    assert callable(before)
    signal.signal(signal.SIGUSR1, lambda *args: (calls.append("second"), before(*args)))
    for _ in range(2):
        deferred.handle([deferred.tell()])
    assert calls == []
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(3):
        deferred.handle([deferred.tell()])
    assert calls == ["second", "first"]
    deferred.release()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert calls == ["second", "first"] * 2


def test_nothing_is_deferred_outside_of_the_main_thread() -> None:
    handler = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=lambda: DeferredSignals().release())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_sigterm_is_everybodys() -> None:
    assert due(told({15: 0.0}, {})) == [signal.SIGTERM]
    calls: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        deferred = DeferredSignals()
        deferred.handle([deferred.tell(), *told({15: 0.0})])  # it came to the other one
        deferred.release()
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert calls == [signal.SIGTERM]


class Recorded(Net):
    """Keeps its weights after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, *_: Any) -> None:
        values = lightning_zinf.full_state_dict(self)
        self.after[self.trainer.global_step] = {name: value.clone() for name, value in values.items()}


def saved_weights(path: Path) -> dict[str, Tensor]:
    with Checkpoint(path) as source:
        return {name: source.tensor(name) for name in source.names()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_signals_at_any_moment_save_whole_steps(tmp_path: Path, precision: Any, clip: float | None) -> None:
    """Signals come all the time, so many of them in the midst of the engine's work; each checkpoint is one step's."""
    options = {"precision": precision, "max_epochs": 4, "gradient_clip_val": clip}
    plain = net(Recorded)
    trainer(tmp_path, zinf(**SHARDED), **options).fit(plain, loader(8))
    module = net()
    used = trainer(tmp_path, zinf(**SHARDED), **options)
    saved: list[int] = []

    def handler(*_: Any) -> None:
        saved.append(used.global_step)
        used.save_checkpoint(tmp_path / f"{used.global_step}.ckpt")

    signal.signal(signal.SIGUSR1, handler)
    stop, draw = threading.Event(), random.Random(0)

    def fire() -> None:
        while not stop.wait(draw.uniform(0.0, 0.01)):
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=fire)
    module.on_train_start = thread.start
    module.on_train_end = lambda: (stop.set(), thread.join())
    try:
        used.fit(module, loader(8))
    finally:
        stop.set()
    assert_same(weights(module), weights(plain))
    assert len(saved) > 3
    assert len(set(saved)) == len(saved)
    for step in saved:
        if step:
            assert_same(saved_weights(tmp_path / f"{step}.ckpt"), plain.after[step])


@pytest.mark.parametrize("epochs", [1, 0], ids=["trains", "only checks"])
def test_a_signal_in_the_sanity_check_waits_for_the_first_batch(tmp_path: Path, epochs: int) -> None:
    """Or, if there is none, for the end."""

    class Signalled(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if self.trainer.sanity_checking:
                os.kill(os.getpid(), signal.SIGUSR1)
            super().validation_step(batch, batch_idx)

    module = net(Signalled)
    used = trainer(tmp_path, zinf(**SHARDED), max_epochs=epochs)
    found: list[tuple[bool, int]] = []

    def handler(*_: Any) -> None:
        found.append((used.sanity_checking, used.global_step))
        used.save_checkpoint(tmp_path / "first.ckpt")

    signal.signal(signal.SIGUSR1, handler)
    used.fit(module, loader(2), loader(2))
    assert found == [(False, 0)]
    assert_same(saved_weights(tmp_path / "first.ckpt"), weights(net()))
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_a_signal_that_comes_while_training_ends_is_handled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the handlers that waited run: too late for them, and later ones ran at once only after that."""
    module, handled = net(), []

    def first(*_: Any) -> None:
        handled.append(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        handled.append(0)

    signal.signal(signal.SIGUSR1, first)
    signal.signal(signal.SIGUSR2, lambda number, frame: handled.append(number))
    module.on_train_end = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    trainer(tmp_path, zinf(**SHARDED)).fit(module, loader(2))
    assert handled == [signal.SIGUSR1, 0, signal.SIGUSR2]
    assert "before the handlers of these signals could run" not in caplog.text


def test_sigterm_ends_training_between_two_steps(tmp_path: Path) -> None:
    class Terminated(Recorded):
        def forward(self, x: Tensor) -> Tensor:
            if self.trainer.training and self.trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x)

    module = net(Terminated)
    with pytest.raises(SIGTERMException):
        trainer(tmp_path, zinf(**SHARDED)).fit(module, loader(6))
    assert list(module.after) == [1, 2, 3]
    assert_same(weights(module), module.after[3])


def test_a_handler_that_stops_training(tmp_path: Path) -> None:
    """What a handler raises ends the fit between two batches, and the next fit works."""

    class Stop(Exception):
        pass

    def handler(*_: Any) -> None:
        raise Stop

    class Signalled(Recorded):
        def forward(self, x: Tensor) -> Tensor:
            if self.trainer.training and self.trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.01)
            return super().forward(x)

    signal.signal(signal.SIGUSR1, handler)
    module = net(Signalled)
    with pytest.raises(Stop):
        trainer(tmp_path, zinf(**SHARDED)).fit(module, loader(6))
    assert list(module.after) == [1, 2, 3]
    assert_same(weights(module), module.after[3])
    assert signal.getsignal(signal.SIGUSR1) is handler
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    trainer(tmp_path, zinf(**SHARDED)).fit(module, loader(2))
