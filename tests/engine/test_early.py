"""Updates in backward, in forward and at once have the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driver import Session, Where, session, train_paged
from models import ZOO
from oracle import Recipe, assert_same, train_plain
from torch.utils.checkpoint import checkpoint

PLACES = [
    Where("nvme", "nvme", tight=True, early=True),
    Where("none", "nvme", early=True),
    Where("nvme", "nvme", aliased=False, tight=True, early=True),
    Where("cpu", "nvme", aliased=False, early=True),
    Where("auto", "auto", share=0.4, early=True),
    Where("nvme", "nvme", update="step"),
]
RECIPES = {"plain": Recipe(clip_norm=None, accumulate=1), "accumulate": Recipe(clip_norm=None, accumulate=2)}
FEW = ["mlp", "gpt", "gpt-recompute-reentrant", "mixture", "lstm"]


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", FEW)
def test_same_bits(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    for number, recipe in enumerate(RECIPES.values()):
        found = train_paged(ZOO[name], tmp_path / str(number), where, precision, recipe)
        assert_same(found, train_plain(ZOO[name], precision, recipe))


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in FEW])
def test_same_bits_of_every_model(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    test_same_bits(name, precision, where, tmp_path)


@pytest.mark.parametrize("where", PLACES[:3], ids=str)
def test_units_are_updated_in_backward_and_their_gradients_are_gone(where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", Recipe(clip_norm=None, accumulate=1)) as it:
        seen: list[tuple[set[int], int]] = []

        def closure() -> float:
            loss = it.micro_step()
            pending = {u.index for u in it.engine.units if any(b.pending for b in u.buffers)}
            assert not pending & it.engine.early.updated
            grads = {
                u.index
                for u in it.engine.units
                for b in u.buffers
                for i in range(len(b.params))
                if b.gradients._of(i) is not None  # type: ignore[attr-defined]
            }
            seen.append((set(it.engine.early.updated), len(grads & it.engine.early.updated)))
            return loss

        for _ in range(3):
            it.binding.early = True
            it.optimizer.step(closure)
        trainable = [u for u in it.engine.units if u.has_trainable]
        assert seen[0] == (set(), 0)  # the first is watched
        assert seen[1] == seen[2]
        assert len(seen[1][0]) == sum(u.index % 3 != 0 for u in trainable) >= 2
        assert seen[1][1] == 0


class Late(torch.nn.Module):
    """Two layers; the first one's weight is used once more, without a gradient, where its own is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.late = False
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.late:  # its backward comes last
            x = x @ self.layers[1].weight.detach()
        return self.layers(x)  # type: ignore[no-any-return]


def _steps(tmp_path: Path, model: Late, lates: list[bool]) -> list[set[int]]:
    updated = []
    case = ZOO["mlp"]
    with session(case, tmp_path, Where("nvme", "nvme", early=True), "32-true", model=model) as it:
        x = torch.nn.Parameter(torch.randn(4, 16))
        first = torch.nn.Linear(16, 16)
        for late in lates:
            model.late = late

            def closure() -> None:
                it.backward(it.forward(lambda: model(first(x)).square().sum()))

            it.binding.early = True
            it.optimizer.step(closure)
            updated.append(set(it.engine.early.updated))
    return updated


def test_a_weight_that_is_needed_late_is_left_to_forward(tmp_path: Path) -> None:
    free, late = _steps(tmp_path / "a", Late(), [False] * 3), _steps(tmp_path / "b", Late(), [True] * 3)
    assert free[0] == late[0] == set()
    assert free[1] == free[2] == {1, 2}
    assert late[1] == late[2] == {2}


def test_a_graph_that_changes_is_refused_by_name(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="backward failed"),
        pytest.raises(RuntimeError, match=r"needs weights of 'layers.1/float32' as they were in forward"),
    ):
        _steps(tmp_path, Late(), [False, False, True])


def test_a_failure_in_backward_is_told(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, Where("nvme", "nvme", early=True), "32-true", Recipe(clip_norm=None)) as it:
        it.step()

        class Fails(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("broken on purpose")

        def closure() -> None:
            first = next(iter(it.model.children()))
            handle = first.register_forward_hook(lambda m, a, out: Fails.apply(out))
            try:
                it.micro_step()
            finally:
                handle.remove()

        it.binding.early = True
        with (
            pytest.warns(UserWarning, match=r"backward failed when \d of \d units had taken"),
            pytest.raises(RuntimeError, match="broken on purpose"),
        ):
            it.optimizer.step(closure)
        it.engine.reset()
        it.step()


class InTwoParts(torch.nn.Module):
    """Layers, of which one's weight, but not its bias, gets a second gradient after both had their first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def early(x: torch.Tensor) -> torch.Tensor:
            return x + torch.nn.functional.linear(x.detach(), self.layers[1].weight)

        x = checkpoint(early, x, use_reentrant=True)
        return checkpoint(self.layers, x, use_reentrant=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("where", [Where("nvme", "nvme", early=True), Where("none", "nvme", early=True)], ids=str)
def test_a_gradient_in_two_parts_is_one_update(where: Where, tmp_path: Path) -> None:
    results, recipe = [], Recipe(clip_norm=None)
    for update in ("auto", "step"):
        torch.manual_seed(0)
        model = InTwoParts()
        there = replace(where, early=update == "auto", update=update)
        with session(ZOO["mlp"], tmp_path / update, there, "32-true", recipe, model=model) as it:
            x = torch.nn.Parameter(torch.randn(4, 16))

            def closure(it: Session = it, x: torch.Tensor = x, model: InTwoParts = model) -> None:
                loss = it.forward(lambda: model(x).square().sum())
                it.losses.append(float(loss.detach()))
                it.backward(loss)

            for step in range(3):
                it.optimizer.zero_grad()
                it.binding.early = it.early
                it.optimizer.step(closure)
                assert it.engine.early.updated == ({2} if step and it.early else set())
            results.append(it.result())
    assert_same(results[0], results[1])
    assert set(results[0].counts.values()) == {3}
