"""Autograd beyond one backward: second derivatives, repeated backwards, updates in between, exceptions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from driver import Session, Where, session
from models import ZOO, vectors
from oracle import Plain, Recipe, assert_same, autocast
from torch import Tensor, nn

PRECISIONS = ["32-true", "bf16-mixed"]
PAGED = [
    Where("nvme", "nvme", tight=True),
    Where("nvme", "nvme", aliased=False, tight=True),
    Where("cpu", "cpu", aliased=False, tight=True),
]
CASE = ZOO["mlp"]
ONCE = Recipe(accumulate=1, steps=2)
everywhere = pytest.mark.parametrize("where", PAGED, ids=str)
both_precisions = pytest.mark.parametrize("precision", PRECISIONS)


def loss_of(model: nn.Module, number: int, precision: str) -> Tensor:
    with autocast(precision):
        return CASE.loss(model, CASE.batch(number), number)


def finish(running: Session, plain: Plain) -> None:
    """Step both and compare everything."""
    running.update()
    plain.step()
    assert_same(running.result(), plain.result(running.losses))


@everywhere
@both_precisions
def test_backward_twice_through_one_graph(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        plain = Plain(CASE.make(), precision, ONCE)
        loss, expected = running.forward(), loss_of(plain.model, 0, precision)
        assert torch.equal(loss, expected)
        for last in (False, True):
            running.engine.before_backward()
            loss.backward(retain_graph=not last)
            running.engine.after_backward()
            expected.backward(retain_graph=not last)
            for name, param in plain.params.items():
                master = plain.masters[name]
                if master is not param and param.grad is not None:
                    master.grad = param.grad.float() + (0.0 if master.grad is None else master.grad)
                    param.grad = None
        finish(running, plain)


@everywhere
@both_precisions
def test_backward_that_builds_a_graph_after_the_step(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        plain = Plain(CASE.make(), precision, ONCE)
        x = vectors(0)[0]
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with running.engine.frame("train") as outputs, autocast(precision):
            torch.manual_seed(0)
            out = running.model(inputs[0]).float().square().sum()
            outputs.append(out)
        with autocast(precision):
            torch.manual_seed(0)
            expected = plain.model(inputs[1]).float().square().sum()
        running.engine.before_backward()
        (grad,) = torch.autograd.grad(out, inputs[0], create_graph=True)
        running.engine.after_backward()
        (expected_grad,) = torch.autograd.grad(expected, inputs[1], create_graph=True)
        assert torch.equal(grad, expected_grad)
        running.backward(grad.square().sum())
        plain.backward(expected_grad.square().sum())
        finish(running, plain)


@everywhere
@both_precisions
def test_gradients_by_every_weight_in_one_call(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        plain = Plain(CASE.make(), precision, ONCE)
        found = torch.autograd.grad(running.forward(), list(running.model.parameters()))
        expected = torch.autograd.grad(loss_of(plain.model, 0, precision), list(plain.model.parameters()))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@everywhere
@both_precisions
def test_gradients_by_every_weight_need_no_weight(where: Where, precision: str, tmp_path: Path) -> None:
    """They would not fit at once."""
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        grads = torch.autograd.grad(running.forward(), list(running.model.parameters()))
        assert len(grads) == 10
        assert running.engine.counters.faults == 0
        assert running.engine.counters.overcommits == 0


@everywhere
@both_precisions
def test_backward_to_named_inputs(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        plain = Plain(CASE.make(), precision, ONCE)
        running.losses.append(float((loss := running.forward()).detach()))
        running.engine.before_backward()
        loss.backward(inputs=[p for p in running.model.parameters() if p.ndim > 1])
        running.engine.after_backward()
        loss_of(plain.model, 0, precision).backward(inputs=[p for p in plain.model.parameters() if p.ndim > 1])
        for name, param in plain.params.items():
            if plain.masters[name] is not param and param.grad is not None:
                plain.masters[name].grad, param.grad = param.grad.float(), None
        finish(running, plain)


@everywhere
@both_precisions
def test_a_look_at_the_weights_between_forward_and_backward(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, Recipe(steps=2)) as running:
        plain = Plain(CASE.make(), precision, Recipe(steps=2))
        seen = []
        for _number in range(2):
            for _ in range(2):
                loss = running.forward()
                expected = loss_of(plain.model, running.number, precision) / 2
                seen.append([float(p.detach().norm()) for p in running.model.parameters()])
                norms = [float(m.detach().norm()) for m in plain.masters.values()]
                assert seen[-1] == norms
                running.backward(loss)
                plain.backward(expected)
                running.losses.append(float(loss.detach()))
                running.number += 1
                [float(p.detach().norm()) for p in running.model.parameters()]
            running.update()
            plain.step()
            running.optimizer.zero_grad()
        assert seen[0] == seen[1] != seen[2] == seen[3]
        assert_same(running.result(), plain.result(running.losses))


@everywhere
@both_precisions
def test_update_between_forward_and_backward_is_refused(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        running.step()
        running.optimizer.zero_grad()
        first, second = running.forward(), running.forward()
        running.backward(first)
        running.update()
        with pytest.raises(RuntimeError, match="updated in between"):
            running.backward(second)
        running.engine.reset()
        running.optimizer.zero_grad()
        running.number = 1
        running.losses = running.losses[:1]
        plain = Plain(CASE.make(), precision, ONCE)
        for number in range(2):  # what was refused left no trace
            plain.backward(loss_of(plain.model, 0, precision) if number == 0 else loss_of(plain.model, 1, precision))
            plain.step()
        assert_same(running.result(), plain.result(running.losses))


class Interrupted(Exception):
    pass


def interrupt(*_: object) -> None:
    raise Interrupted


@everywhere
@both_precisions
@pytest.mark.parametrize("moment", ["forward", "between-units", "backward", "gradient-hook", "optimizer-hook"])
def test_training_goes_on_after_an_exception(where: Where, precision: str, moment: str, tmp_path: Path) -> None:
    recipe = Recipe(accumulate=1, steps=4)
    with session(CASE, tmp_path, where, precision, recipe) as running:
        plain = Plain(CASE.make(), precision, recipe)
        for number in range(4):
            plain.backward(loss_of(plain.model, number, precision))
            plain.step()
        running.train(2)
        model, before = running.model, running.number
        if moment == "forward":
            handle = model[6].register_forward_pre_hook(interrupt)
        elif moment == "between-units":
            handle = model[7].register_forward_hook(interrupt)
        elif moment == "backward":
            handle = model[4].register_full_backward_hook(interrupt)
        elif moment == "gradient-hook":
            handle = model[6].weight.register_hook(interrupt)
        else:
            handle = running.optimizer.register_step_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            running.step()
        handle.remove()
        running.engine.reset()
        running.number = before
        del running.losses[before:]
        running.train(2)
        assert_same(running.result(), plain.result(running.losses))


@everywhere
@both_precisions
def test_inference_mode_before_training(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        running.model.eval()
        for _ in range(2):
            with torch.inference_mode(), running.engine.frame("validate"), autocast(precision):
                out = running.model(vectors(3)[0])
            assert out.is_inference()
        running.model.train()
        plain = Plain(CASE.make(), precision, ONCE)
        for number in range(2):
            running.step()
            plain.backward(loss_of(plain.model, number, precision))
            plain.step()
        with torch.inference_mode():
            weights = [p.clone() for p in running.model.parameters()]
        assert_same(running.result(), plain.result(running.losses))
        for ours, theirs in zip(weights, plain.masters.values(), strict=True):
            assert torch.equal(ours, theirs)


@everywhere
@both_precisions
def test_nested_frames(where: Where, precision: str, tmp_path: Path) -> None:
    """A validation step inside of a training step, and a module called from within another's forward."""
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        plain = Plain(CASE.make(), precision, ONCE)

        def loss() -> Tensor:
            with running.engine.frame("validate"), torch.no_grad():
                CASE.loss(running.model, CASE.batch(9), 9)
            with torch.no_grad():
                CASE.loss(running.model, CASE.batch(9), 9)
            return CASE.loss(running.model, CASE.batch(running.number), running.number)

        for number in range(2):
            running.optimizer.zero_grad()
            running.micro_step(loss)
            running.update()
            plain.backward(loss_of(plain.model, number, precision))
            plain.step()
        assert_same(running.result(), plain.result(running.losses))


@everywhere
@both_precisions
def test_a_step_sees_the_dtype_that_compute_uses(where: Where, precision: str, tmp_path: Path) -> None:
    """Whether or not its unit is resident at that moment."""
    low = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        with running.engine.frame("validate"):
            for param in running.model.parameters():
                described = param.dtype, param.element_size(), param.nbytes
                touched = param * 1
                assert described == (low, low.itemsize, param.numel() * low.itemsize)
                assert touched.dtype == low
        assert {p.dtype for p in running.model.parameters()} == {torch.float32}


@everywhere
@both_precisions
def test_forward_outside_of_a_step_computes_with_the_masters(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        running.train(2)
        masters = {n: t.clone() for n, t in running.result().masters.items()}
        plain = CASE.make().eval()
        plain.load_state_dict(masters)
        x, target = vectors(5)
        running.model.eval()
        found, expected = running.model(x), plain(x)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        F.cross_entropy(found, target).backward()
        F.cross_entropy(expected, target).backward()
        if where.aliased is None:  # else gradients have left the device, see Note [Gradients]
            for ours, theirs in zip(running.model.parameters(), plain.parameters(), strict=True):
                assert ours.grad is not None
                assert torch.equal(ours.grad.float(), theirs.grad)
