"""What the ranks do in the tests of the sections of Lightning's contract."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.loops.utilities as lightning_loops
import torch
from contracts import made
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_cases import Net, loader, net
from torch import Tensor
from trainers import build

import lightning_zinf


def words_of(function: Callable[[], Any]) -> str:
    """Return what a call raises, or nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def state(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lightning_zinf.full_state_dict(module).items()}


def evaluate(rank: int, size: int, folder: Path, strategy: Any) -> tuple[dict[str, Tensor], Any]:
    """Predict with a model that every rank has drawn for itself, and never fits."""
    torch.manual_seed(rank)
    model = Net()
    predicted = build(size, made(strategy), folder).predict(model, loader(2))
    return state(model), predicted


def accumulate(rank: int, size: int, folder: Path, strategy: Any) -> dict[int, int]:
    """Return the bytes of gradients that are reduced for an optimizer step, by the batches that it has."""
    found = {}
    for batches in (1, 4):
        running = build(size, made(strategy), folder, accumulate_grad_batches=batches, max_steps=1)
        running.fit(net(), loader(8))
        found[batches] = running.strategy.engine.counters.reduce_scatter_bytes
    return found


def infer(rank: int, size: int, folder: Path, strategy: Any) -> tuple[set[bool], set[bool], dict[str, Tensor]]:
    """Evaluate and fit in turns, under the context that Lightning takes for other backends than gloo."""
    modes = set()

    class Watching(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            modes.add(torch.is_inference_mode_enabled())
            super().validation_step(batch, batch_idx)

    model = net(Watching)
    running = build(size, made(strategy), folder, num_sanity_val_steps=0, limit_val_batches=2)
    is_initialized = lightning_loops._distributed_is_initialized
    lightning_loops._distributed_is_initialized = lambda: False
    try:
        running.validate(model, loader(4), verbose=False)
        left = {p.is_inference() for p in model.parameters()}
        running.fit(model, loader(8))
        running.predict(model, loader(4))
        running.fit_loop.max_epochs = 2
        running.fit(model, loader(8))
    finally:
        lightning_loops._distributed_is_initialized = is_initialized
    return modes, left, state(model)


class Breaks(Net):
    """Raises on rank 1 alone, in its second batch; ``where`` says at which place."""

    where = ""

    def broken(self, here: str) -> None:
        if here == self.where and self.global_rank == 1 and self.trainer.global_step == 1:
            raise RuntimeError("broken on purpose")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        if self.trainer.training:
            self.broken("forward")
        if x.requires_grad:
            x.register_hook(lambda grad: self.broken("backward"))
        return self.head(self.blocks[1](x)) * self.scale

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        self.broken("training_step")
        return None if self.where == "None" and self.global_rank == 1 and self.trainer.global_step == 1 else loss

    def on_after_backward(self) -> None:
        self.broken("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.broken("on_before_optimizer_step")


def break_and_go_on(
    rank: int, size: int, folder: Path, strategy: Any, where: str, saves: bool
) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Fit until rank 1 breaks, then fit the same model again, and another one."""
    model = net(Breaks)
    model.where = where
    options: dict[str, Any] = {}
    if saves:
        options = {
            "callbacks": [ModelCheckpoint(folder / "saved", save_on_exception=True)],
            "enable_checkpointing": True,
        }
    said = words_of(lambda: build(size, made(strategy), folder, **options).fit(model, loader(8)))
    model.where = ""
    build(size, made(strategy), folder).fit(model, loader(8))
    again = state(model)
    other = net(Breaks)
    build(size, made(strategy), folder).fit(other, loader(8))
    return said, again, state(other)


def stop_and_go_on(rank: int, size: int, folder: Path, strategy: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fit one step and then as from the start; and as if nothing had been."""
    model, other = net(), net()
    build(size, made(strategy), folder, max_steps=1).fit(model, loader(8))
    for module in (model, other):
        build(size, made(strategy), folder).fit(module, loader(8))
    return state(model), state(other)


class AllBreak(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if batch_idx == 2:
            raise RuntimeError(f"broken on rank {self.global_rank}")
        return super().training_step(batch, batch_idx)


def all_break_and_save(rank: int, size: int, folder: Path, strategy: Any) -> tuple[str, int, dict[str, Tensor]]:
    """Have a checkpoint saved when all ranks raise, and load it."""
    saver = ModelCheckpoint(folder / "saved", save_on_exception=True)
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder, callbacks=[saver], enable_checkpointing=True)
    model = net(AllBreak)
    said = words_of(lambda: running.fit(model, loader(8)))
    (path,) = (folder / "saved").iterdir()
    loaded = net()
    build(size, lightning_zinf.ZinfStrategy(**strategy), folder).validate(
        loaded, loader(2), ckpt_path=path, verbose=False
    )
    return said, running.global_step, state(loaded)


class Overflows(Net):
    """Has a gradient that is not finite on rank 1, in the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append((self.trainer.scaler.get_scale(), float(self.head.bias.detach())))
        loss = self.loss(batch)
        return loss * 1e30 if batch_idx == 1 and self.global_rank == 1 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def overflow(rank: int, size: int, folder: Path, strategy: Any) -> list[tuple[float, float]]:
    """Return the loss scale and a weight before each step."""
    model = net(Overflows)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    build(size, made(strategy), folder, plugins=[plugin]).fit(model, loader(8))
    return model.seen  # type: ignore[no-any-return]


class Unsynchronised(Net):
    """Two backwards for a step, of which Lightning has only the second synchronised."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for factor in (1, 2):
            with optimizer.toggle_model(sync_grad=factor == 2):
                self.manual_backward(self.loss(factor * batch))
        optimizer.step()


def unsynchronised(rank: int, size: int, folder: Path, strategy: Any) -> dict[str, Tensor]:
    model = net(Unsynchronised)
    build(size, made(strategy), folder).fit(model, loader(8))
    return state(model)


def save_under_other_names(rank: int, size: int, folder: Path, strategy: Any) -> tuple[dict[str, Tensor], Any]:
    """Save under a name that differs between ranks, as a metric in it would make it; load what there is."""
    model, loaded = net(), net()
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)
    running.fit(model, loader(4))
    running.save_checkpoint(folder / f"saved-{rank}.ckpt")
    other = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)
    other.validate(loaded, loader(2), ckpt_path=folder / "saved-0.ckpt", verbose=False)
    return state(model), state(loaded)


class Saves(Net):
    """Saves in the midst of a forward, each rank at a place of its own: as signals find them."""

    path: Any = None

    def save(self, place: int) -> None:
        if self.path and self.trainer.global_step == 1 and place == self.global_rank:
            self.trainer.save_checkpoint(self.path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        self.save(0)
        x = self.blocks[1](x)
        self.save(1)
        return self.head(x) * self.scale


class Signalled(Net):
    """A signal comes in the second batch, at a place of its own on each rank, or on rank 0 only."""

    ranks = 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        if self.trainer.training and self.trainer.global_step == 1 and self.global_rank < self.ranks:
            if self.global_rank == 0:
                os.kill(os.getpid(), signal.SIGUSR1)
            x.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGUSR1))
        x = self.blocks[1](x)
        return self.head(x) * self.scale


def save_at_a_signal(rank: int, size: int, folder: Path, strategy: Any) -> tuple[list[int], list[dict[str, Tensor]]]:
    """Return when the handlers ran, the weights with signals and without and after a whole step, and what was saved."""
    model, handled = net(Signalled), []
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)

    def handler(*_: Any) -> None:
        handled.append(running.global_step)
        running.save_checkpoint(folder / "saved.ckpt")

    earlier = signal.signal(signal.SIGUSR1, handler)
    try:
        running.fit(model, loader(8))
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    found = [state(model)]
    for steps in (-1, 2):
        model = net()
        build(size, lightning_zinf.ZinfStrategy(**strategy), folder, max_steps=steps).fit(model, loader(8))
        found.append(state(model))
    loaded = net()
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)
    running.validate(loaded, loader(2), ckpt_path=folder / "saved.ckpt", verbose=False)
    return handled, [*found, state(loaded)]


class CheckSignalled(Net):
    """A signal comes in the sanity check, at a place of its own on each rank."""

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate((*self.blocks, self.head)):
            if self.trainer.sanity_checking and number == self.global_rank:
                os.kill(os.getpid(), signal.SIGUSR1)
            x = layer(x)
        return x * self.scale


def save_at_a_signal_in_the_sanity_check(
    rank: int, size: int, folder: Path, strategy: Any
) -> tuple[list[tuple[bool, int]], dict[str, Tensor], dict[str, Tensor]]:
    """Return when the handlers ran, the weights before training, and what was saved."""
    model, handled = net(CheckSignalled), []
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)

    def handler(*_: Any) -> None:
        handled.append((running.sanity_checking, running.global_step))
        running.save_checkpoint(folder / "saved.ckpt")

    earlier = signal.signal(signal.SIGUSR1, handler)
    try:
        running.fit(model, loader(4), loader(2))
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    loaded = net()
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)
    running.validate(loaded, loader(2), ckpt_path=folder / "saved.ckpt", verbose=False)
    return handled, dict(net().state_dict()), state(loaded)


def sigterm_to_one_rank(rank: int, size: int, folder: Path, strategy: Any) -> tuple[str, int]:
    """Return what ended training, and after how many steps."""

    class Terminated(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.trainer.training and self.trainer.global_step == 1 and self.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x)

    model = net(Terminated)
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)
    try:
        running.fit(model, loader(8))
        words = ""
    except SystemExit as error:  # Lightning's SIGTERMException is one
        words = type(error).__name__
    return words, running.global_step


def a_signal_to_one_rank(rank: int, size: int, folder: Path, strategy: Any) -> tuple[list[int], dict[str, Tensor]]:
    """Return the steps at which the handler ran on this rank."""
    model, handled = net(Signalled), []
    model.ranks = 1
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)
    earlier = signal.signal(signal.SIGUSR1, lambda *_: handled.append(running.global_step))
    try:
        running.fit(model, loader(8))
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    return handled, state(model)


def save_in_the_middle(rank: int, size: int, folder: Path, strategy: Any) -> list[dict[str, Tensor]]:
    """Return weights of a run that saves, of one that does not, of what was saved, and after the step before."""
    found = []
    for path, steps in ((folder / "saved.ckpt", -1), (None, -1), (None, 1)):
        model = net(Saves)
        model.path = path
        build(size, lightning_zinf.ZinfStrategy(**strategy), folder, max_steps=steps).fit(model, loader(8))
        found.append(state(model))
    loaded = net()
    running = build(size, lightning_zinf.ZinfStrategy(**strategy), folder)
    running.validate(loaded, loader(2), ckpt_path=folder / "saved.ckpt", verbose=False)
    return [*found, state(loaded)]
