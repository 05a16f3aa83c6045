"""What cannot work is refused by name, before anything is moved."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_zinf.comm.group import ranks_of
from lightning_zinf.config import PartitionConfig
from lightning_zinf.engine.overlaps import refuse_overlaps
from lightning_zinf.engine.partition import engine_of, partition
from lightning_zinf.optim.binding import OptimizerBinding, binding_of

CPU = torch.device("cpu")


class Subclass(Tensor):
    """Stands for a DTensor or a quantized weight."""


class OwnStep(torch.optim.AdamW):
    """Looks at whole gradients."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad /= param.grad.norm()
        return super().step(closure)


def config(folder: Path) -> PartitionConfig:
    return PartitionConfig(CPU, "32-true", "nvme", "nvme", (str(folder),))


def with_subclass() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.ones(4, 4).as_subclass(Subclass))  # type: ignore[arg-type]
    return module


def with_shared_memory() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    module[1].weight.data = module[0].weight.data[:2]
    return module


def test_a_trained_part_of_frozen_memory(tmp_path: Path) -> None:
    """Frozen views lie in a frozen whole, which is fine, and a trained one after them, which is not."""
    whole = nn.Parameter(torch.zeros(12), requires_grad=False)
    parts = [nn.Parameter(whole.data[i : i + 3], requires_grad=i == 6) for i in (0, 3, 6)]
    module = nn.ParameterList([whole, *parts])
    with pytest.raises(ValueError, match="'0' and '3' share memory"):
        partition(module, config(tmp_path), [parts[-1]])
    engine = partition(module, config(tmp_path), [])
    engine.dissolve()


def columns(width: int, learns: int) -> nn.ParameterList:
    """Views of one matrix of three columns; number ``learns`` takes ``width`` of them."""
    base = torch.arange(12.0).view(4, 3)
    views = [base[:, i : i + (width if i == learns else 1)] for i in range(3)]
    return nn.ParameterList(nn.Parameter(v, requires_grad=i == learns) for i, v in enumerate(views))


@pytest.mark.parametrize("learns", range(3))
def test_views_that_lie_between_each_other_share_nothing(learns: int, tmp_path: Path) -> None:
    module = columns(1, learns)
    engine = partition(module, config(tmp_path), [module[learns]])
    engine.dissolve()
    assert [p.flatten().tolist() for p in module] == [[i, 3.0 + i, 6.0 + i, 9.0 + i] for i in range(3)]
    module = columns(2, 0)
    with pytest.raises(ValueError, match="'0' and '1' share memory"):
        partition(module, config(tmp_path), [module[0]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (with_shared_memory, "'0.weight' and '1.weight' share memory.*: tie them as one"),
        (with_subclass, "'weight' is a .*Subclass: .* partitions plain tensors only"),
        (lambda: nn.LazyLinear(4), "'weight' is lazy and has no shape yet"),
        (lambda: nn.Linear(4, 4, dtype=torch.float64), "'weight' has dtype torch.float64"),
    ],
)
def test_parameters(build: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    module = build()
    with pytest.raises(ValueError, match=message):
        partition(module, config(tmp_path), list(module.parameters()))
    assert engine_of(module) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), r"returned torch\.optim\.lbfgs\.LBFGS.* does not work on parts of parameters"),
        (lambda p: torch.optim.Adafactor(p), r"returned torch\.optim\..*Adafactor.* does not work on parts"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "differentiable=True"),
        (lambda p: OwnStep(p), r"OwnStep, which does not work on parts of parameters: the weights come out different"),
        (lambda p: torch.optim.AdamW([*p, nn.Parameter(torch.ones(7))]), r"shape \(7,\) .* does not manage"),
    ],
)
def test_optimizers(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], message: str, tmp_path: Path) -> None:
    module = nn.Linear(64, 64)
    before = module.weight.detach().clone()
    optimizer = build(list(module.parameters()))
    engine = partition(module, config(tmp_path), list(module.parameters()))
    with pytest.raises(ValueError, match=message):
        OptimizerBinding(optimizer, engine)
    assert torch.equal(module.weight, before)
    with pytest.raises(ValueError, match="is not bound to the zinf strategy"):
        binding_of(optimizer)
    engine.context.close()


def test_clipping_by_value_and_then_by_norm(tmp_path: Path) -> None:
    module = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(module.parameters())
    binding = OptimizerBinding(optimizer, partition(module, config(tmp_path), list(module.parameters())))
    binding.clip_by_value(1.0)
    with pytest.raises(ValueError, match="by value and then by norm"):
        binding.clip_by_norm(1.0)


def test_a_sparse_gradient(tmp_path: Path) -> None:
    module = nn.Embedding(16, 8, sparse=True)
    optimizer = torch.optim.AdamW(module.parameters())
    engine = partition(module, config(tmp_path), list(module.parameters()))
    OptimizerBinding(optimizer, engine)
    with engine.frame("train") as outputs:
        outputs.append(module(torch.tensor([1, 2])).sum())
    engine.before_backward()
    outputs[-1].backward()
    engine.after_backward()
    with pytest.raises(ValueError, match="has a sparse gradient"):
        optimizer.step()


def test_a_process_group_for_an_accelerator_alone() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("cuda:gloo", store=store, rank=0, world_size=1)  # stands for nccl
    try:
        with pytest.raises(ValueError, match=r"backend 'cuda:gloo', which moves no tensors in host memory"):
            ranks_of(None, timedelta(seconds=20))
    finally:
        dist.destroy_process_group()


@given(st.data())
def test_shared_elements_are_found_exactly(data: st.DataObject) -> None:
    """Against sets of addresses, for views of one tensor in any shape and stride."""
    base = torch.zeros(24)
    views, learns = [], []
    for _ in range(data.draw(st.integers(2, 4))):
        rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        strides = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
        reach = (rows - 1) * strides[0] + (columns - 1) * strides[1]
        first = data.draw(st.integers(0, 23 - reach))
        views.append(base.as_strided((rows, columns), strides, first))
        learns.append(data.draw(st.booleans()))
    module = nn.ParameterList(nn.Parameter(v, requires_grad=False) for v in views)
    trained = {id(p) for p, learned in zip(module, learns, strict=True) if learned}
    index = torch.arange(24)
    places = [set(index.as_strided(v.shape, v.stride(), v.storage_offset()).flatten().tolist()) for v in views]
    pairs = {(i, j) for j in range(len(views)) for i in range(j) if places[i] & places[j] and (learns[i] or learns[j])}
    if not pairs:
        refuse_overlaps(module, trained)
    else:
        with pytest.raises(ValueError, match="share memory") as caught:
            refuse_overlaps(module, trained)
        assert any(f"parameters '{i}' and '{j}' share" in str(caught.value) for i, j in pairs)
