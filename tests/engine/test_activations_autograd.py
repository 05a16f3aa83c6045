"""Activation checkpointing and offloading under unusual uses of autograd, with the bits of training without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from activation_cases import (
    AWAY,
    ONCE,
    RECIPE,
    described,
    nothing_left,
    treated,
)
from driver import Where, session
from models import WIDTH, ZOO, Case, vectors
from oracle import Result, assert_same
from torch import Tensor, nn


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
