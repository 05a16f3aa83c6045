"""Whatever a step does with paged parameters, it computes what plain PyTorch computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from driver import Where, session, train_paged
from models import BATCH, GPT, VOCAB, WIDTH, ZOO, Batch, Block, Case, loss_of, mlp, tokens, vectors
from oracle import Recipe, assert_same, train_plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PRECISIONS = ["32-true", "bf16-mixed"]
PAGED = [
    Where("nvme", "nvme", tight=True),
    Where("nvme", "cpu"),
    Where("nvme", "nvme", aliased=False, tight=True),
    Where("cpu", "cpu", aliased=False, tight=True),
]
ABNORMAL = ("faults", "refills", "orphaned_slots", "overcommits")


class Span(GPT):
    """One checkpoint around all blocks."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position

        def run(x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

        x = checkpoint(run, x, use_reentrant=self.recompute)
        out: Tensor = self.head(self.norm(x))
        return out


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class ForeignWeight(GPT):
    """The root applies an ``autograd.Function`` to a weight that another unit owns and has released."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.blocks[0](self.embed(ids)) + self.position)
        out: Tensor = Multiply.apply(x.to(self.embed.weight.dtype), self.embed.weight)
        return out


class Stash(torch.autograd.Function):
    """Keeps a view of the weight where no saved-tensor hook can see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.w = w.detach().t()
        return x @ ctx.w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad @ ctx.w.t(), grad.t() @ x


class StashLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Stash.apply(x.to(self.weight.dtype), self.weight)
        return out


def stashing() -> nn.Module:
    return nn.Sequential(*[StashLinear(WIDTH, WIDTH, bias=False) for _ in range(5)], nn.Linear(WIDTH, 10))


class ViewThenInplace(nn.Module):
    """A unit returns a view which its caller changes in place: autograd drops the hook on the unit's output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Unflatten(-1, (4, -1)))
        self.second = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.first(x)
        h += x.unflatten(-1, (4, -1))
        out: Tensor = self.second(h.flatten(-2))
        return out


class Foreach(GPT):
    """Reads every weight of the model in one call of a list operator."""

    def forward(self, ids: Tensor) -> Tensor:
        norms = torch._foreach_norm(list(self.parameters()))
        out = super().forward(ids)
        return out * torch.stack([n.float() for n in norms]).mean()


class Twice(nn.Module):
    """A unit that is called twice, the second time with its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in (self.blocks[0], self.blocks[1], self.blocks[0], self.blocks[1]):
            x = block(x)
        out: Tensor = self.out(x)
        return out


class Outputs(nn.Module):
    """Units that return a dict, a tuple with what is not a tensor, and take keyword arguments."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, *, state: dict[str, Any]) -> dict[str, Any]:
            return {"x": [self.linear(state["x"][0]).relu()], "depth": state["depth"] + 1}

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(3))
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        state: dict[str, Any] = {"x": [x], "depth": 0}
        for part in self.parts:
            state = part(state=state)
        assert state["depth"] == 3
        out: Tensor = self.out(state["x"][0])
        return out


def squares_of_weights(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """A regularizer that touches every unit of the model one after the other."""
    penalty = torch.stack([p.float().square().sum() for p in model.parameters()]).sum()
    return loss_of(model, batch, step) + 1e-4 * penalty


def gradient_penalty(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """A loss with the gradient of the outputs by the inputs in it: backward through a backward."""
    torch.manual_seed(1000 + step)
    x = batch[0].clone().requires_grad_()
    out = model(x)
    (grad,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    return F.cross_entropy(out.float(), batch[1]) + 0.1 * grad.float().square().mean()


def weight_gradient_penalty(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """A loss with the gradient by every weight in it."""
    loss = loss_of(model, batch, step)
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=True)
    return loss + 0.1 * torch.stack([g.float().square().sum() for g in grads]).sum()


def called_functionally(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """Half of the weights are replaced in the call."""
    torch.manual_seed(1000 + step)
    replaced = {n: p * 1.01 for i, (n, p) in enumerate(model.named_parameters()) if i % 2}
    out = torch.func.functional_call(model, replaced, (batch[0],))
    return F.cross_entropy(out.float(), batch[1])


def mapped(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """The first layer under ``vmap``, which sees its weight from outside of the unit."""
    first, rest = model[0], model[1:]
    torch.manual_seed(1000 + step)
    x = torch.vmap(lambda row: F.linear(row, first.weight, first.bias))(batch[0].to(first.weight.dtype))
    return F.cross_entropy(rest(x).float(), batch[1])


def saved_on_cpu(model: nn.Module, batch: Batch, step: int) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return loss_of(model, batch, step)


def several_losses(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """Two forwards in a step."""
    return loss_of(model, batch, step) + 0.5 * loss_of(model, (batch[0].flip(0), batch[1]), step)


CASES = {
    "checkpoint-over-units": Case(lambda: Span(recompute=False), tokens),
    "checkpoint-over-units-reentrant": Case(lambda: Span(recompute=True), tokens),
    "function-on-foreign-weight": Case(ForeignWeight, tokens, units=("Embedding",)),
    "stash": Case(stashing, vectors),
    "view-then-inplace": Case(ViewThenInplace, tokens, units=("Sequential", "Embedding")),
    "foreach": Case(Foreach, tokens, units=("Embedding",)),
    "called-twice": Case(Twice, tokens),
    "dict-outputs": Case(Outputs, vectors),
    "weights-in-the-loss": Case(mlp, vectors, squares_of_weights),
    "gradient-penalty": Case(mlp, vectors, gradient_penalty),
    "weight-gradient-penalty": Case(mlp, vectors, weight_gradient_penalty),
    "functional-call": Case(mlp, vectors, called_functionally),
    "vmap": Case(mlp, vectors, mapped),
    "save-on-cpu": Case(mlp, vectors, saved_on_cpu),
    "two-forwards": Case(mlp, vectors, several_losses),
}


@pytest.mark.parametrize("where", PAGED, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_step(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    recipe = Recipe(steps=3)
    found = train_paged(CASES[name], tmp_path, where, precision, recipe)
    assert_same(found, train_plain(CASES[name], precision, recipe))


@pytest.mark.parametrize("where", PAGED, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("mixture", "late")])
def test_normal_runs_are_normal(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    """Hooks foresee every use: no fault, no refill, no slot left behind, no budget exceeded."""
    with session(ZOO[name], tmp_path, where, precision, Recipe()) as running:
        running.train(2)
        before = running.engine.counters.snapshot()
        running.train(2)
        grown = running.engine.counters.since(before)
        assert {n: grown[n] for n in ABNORMAL} == dict.fromkeys(ABNORMAL, 0)


@pytest.mark.parametrize("where", PAGED, ids=str)
def test_a_stashed_view_stays_right_and_is_counted(where: Where, tmp_path: Path) -> None:
    with session(CASES["stash"], tmp_path, where) as running:
        running.train(2)
        running.engine.flush()
        assert running.engine.counters.orphaned_slots + running.engine.counters.overcommits > 0


@pytest.mark.parametrize("where", PAGED, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_fast_path(precision: str, where: Where, tmp_path: Path) -> None:
    """In evaluation ``nn.TransformerEncoder`` hands all weights of a layer to one kernel."""
    case = ZOO["attention"]
    with session(case, tmp_path, where, precision) as running:
        running.train(1)
        weights = {n: t.clone() for n, t in running.result().masters.items()}
        running.model.eval()
        ids = tokens(7)[0]
        with running.engine.frame("validate"), torch.no_grad():
            found = running.model(ids)
    plain = case.make().eval()
    plain.load_state_dict(weights)
    if precision == "bf16-mixed":
        plain = plain.bfloat16()  # rounds half to even, ours half up; ties are rare
    with torch.no_grad():
        expected = plain(ids)
    assert found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), atol=2e-2 if precision == "bf16-mixed" else 1e-6)


def test_batches_are_what_the_tests_think() -> None:
    assert tokens(0)[0].shape[0] == vectors(0)[0].shape[0] == BATCH
