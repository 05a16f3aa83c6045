"""What training is supposed to compute, in plain PyTorch, on whole tensors.

``32-true`` is the model itself and torch's optimizer. In ``bf16-mixed`` (and where parameters are bfloat16 from birth)
the masters are float32, compute sees them rounded half up to bfloat16 (in ``16-mixed`` to nearest float16), gradients
are added up over micro-batches in float32, and the optimizer acts on the masters.

The optimizer is ``torch.optim``'s single-tensor path. One operation is replaced: torch's float32 square root on a CPU
is only within one unit in the last place of the true one. Ours is correctly rounded, which the oracle gets by way of
float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from models import Case
from torch import Tensor, nn

_SQRT = torch.Tensor.sqrt


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        accumulate: Micro-batches in a step.
        clip_norm: Largest norm of all gradients, or None.
        clip_value: Largest absolute value of a gradient, or None.
        optimizer: Its class.
        decay: Weight decay of parameters with two dimensions or more; the others have none.
        options: More options of the optimizer.
    """

    steps: int = 6
    accumulate: int = 2
    clip_norm: float | None = 0.5
    clip_value: float | None = None
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    decay: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer, with weight-decay groups by dimension."""
        params = [p for p in params if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": self.decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"lr": 3e-3}
        if self.adam:
            options.update(betas=(0.9, 0.95), foreach=False, fused=False)
        options.update(self.options)
        if self.optimizer is torch.optim.Rprop:
            groups = [{"params": g["params"]} for g in groups]  # which knows no weight decay
        return self.optimizer([g for g in groups if g["params"]], **options)

    @property
    def adam(self) -> bool:
        """Whether our kernel does it."""
        return self.optimizer in (torch.optim.Adam, torch.optim.AdamW) and not self.options.get("amsgrad")

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm up, then decay."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3) * 0.98**step)


@dataclass
class Result:
    """What a run left.

    Attributes:
        losses: The loss of every micro-batch.
        masters: Master weights by name.
        planes: The optimizer's tensors of the parameter's shape, by name of parameter and of plane.
        rest: What else the optimizer keeps of a parameter, by name.
        counts: Optimizer steps that each parameter has seen.
    """

    losses: list[float] = field(default_factory=list)
    masters: dict[str, Tensor] = field(default_factory=dict)
    planes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rest: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def put_state(result: Result, name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    """Sort torch's state of a parameter into planes and the rest."""
    planes = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == param.shape and k != "step"}
    result.planes[name] = {k: v.detach().clone() for k, v in planes.items()}
    result.rest[name] = {k: float(v) for k, v in state.items() if k not in planes and v is not None}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same(found: Result, expected: Result) -> None:
    """Compare two runs, to the bit."""
    assert len(found.losses) == len(expected.losses)
    for number, (ours, theirs) in enumerate(zip(found.losses, expected.losses, strict=True)):
        assert ours == theirs, f"loss of micro-batch {number}: {ours!r}, expected {theirs!r}"
    assert found.counts == expected.counts
    assert found.masters.keys() == expected.masters.keys()
    for name, master in expected.masters.items():
        _assert_bits(f"master of {name}", found.masters[name], master)
    assert found.rest == expected.rest
    assert found.planes.keys() == expected.planes.keys()
    for name, planes in expected.planes.items():
        assert found.planes[name].keys() == planes.keys()
        for kind, plane in planes.items():
            _assert_bits(f"{kind} of {name}", found.planes[name][kind], plane)


def _assert_bits(what: str, found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    differ = bits(found) != bits(expected)
    assert not differ.any(), (
        f"{what}: {int(differ.sum())} of {differ.numel()} elements differ, by up to "
        f"{float((found.double() - expected.double()).abs().max())}"
    )


def round_half_up(master: Tensor) -> Tensor:
    """Round float32 to bfloat16, ties away from zero, in integers."""
    whole = master.detach().contiguous().view(torch.int32).to(torch.int64)
    return ((whole + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


LOW = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def autocast(precision: str, device: str = "cpu") -> Any:
    if precision in LOW:
        return torch.autocast(device, dtype=LOW[precision], cache_enabled=False)
    return nullcontext()


@contextmanager
def exact_sqrt() -> Iterator[None]:
    """Make ``Tensor.sqrt`` correctly rounded."""

    def sqrt(tensor: Tensor) -> Tensor:
        return _SQRT(tensor.double()).float() if tensor.dtype == torch.float32 else _SQRT(tensor)

    torch.Tensor.sqrt = sqrt  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.sqrt = _SQRT  # type: ignore[method-assign]


class Plain:
    """A model in plain PyTorch, with float32 masters where it computes in bfloat16.

    Args:
        model: The model; it is copied.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        recipe: How to train it.
    """

    def __init__(self, model: nn.Module, precision: str, recipe: Recipe) -> None:
        self.model = copy.deepcopy(model)
        self.precision = precision
        self.recipe = recipe
        whole = {
            id(p)
            for m in self.model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
            for p in m.parameters(recurse=False)
        }
        self.masters: dict[str, nn.Parameter] = {}
        self.params = dict(self.model.named_parameters())
        for name, param in self.params.items():
            low = param.dtype == torch.bfloat16 or (precision in LOW and id(param) not in whole)
            self.masters[name] = nn.Parameter(param.detach().float().clone(), param.requires_grad) if low else param
        self.optimizer = recipe.build(self.masters.values())
        self.schedule = recipe.schedule(self.optimizer)
        self.publish()

    def publish(self) -> None:
        """Let compute see the masters."""
        for name, param in self.params.items():
            if self.masters[name] is param:
                continue
            if self.precision == "16-mixed" and param.dtype != torch.bfloat16:
                param.data = self.masters[name].detach().half()
            else:
                param.data = round_half_up(self.masters[name])

    def backward(self, loss: Tensor) -> None:
        """Add this backward's gradients up in float32."""
        loss.backward()
        for name, param in self.params.items():
            master = self.masters[name]
            if master is not param and param.grad is not None:
                grad = param.grad.float()
                master.grad = grad if master.grad is None else master.grad + grad
                param.grad = None

    def step(self) -> None:
        """Clip, update, publish."""
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        if self.recipe.clip_norm is not None:
            total = sum(float(g.double().square().sum()) for g in grads) ** 0.5
            norm = torch.tensor(total, dtype=torch.float32)
            coefficient = torch.clamp(self.recipe.clip_norm / (norm + 1e-6), max=1.0)
            for grad in grads:
                grad.mul_(coefficient)
        if self.recipe.clip_value is not None:
            for grad in grads:
                grad.clamp_(-self.recipe.clip_value, self.recipe.clip_value)
        with exact_sqrt() if self.recipe.adam else nullcontext():
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.publish()

    def result(self, losses: list[float]) -> Result:
        result = Result(losses)
        for name, master in self.masters.items():
            result.masters[name] = master.detach().clone()
            state = self.optimizer.state.get(master)
            result.counts[name] = int(state.get("step", 0)) if state else 0
            if state:
                put_state(result, name, master, state)
        return result


def train_plain(case: Case, precision: str, recipe: Recipe, observe: Callable[[Plain], None] | None = None) -> Result:
    """Train a model of the zoo in plain PyTorch."""
    plain = Plain(case.oracle(case.make(), precision), precision, recipe)
    losses: list[float] = []
    for step in range(recipe.steps):
        for micro in range(recipe.accumulate):
            number = step * recipe.accumulate + micro
            with autocast(precision):
                loss = case.loss(plain.model, case.batch(number), number) / recipe.accumulate
            plain.backward(loss)
            losses.append(float(loss.detach()))
        plain.step()
        if observe is not None:
            observe(plain)
    return plain.result(losses)
