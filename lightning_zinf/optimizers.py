"""Taking over the optimizers of ``configure_optimizers``, with the state that they have.

Lightning calls ``configure_optimizers`` for every fit. Most modules make a new optimizer then, whose state is empty;
some return one that they kept, or loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_zinf.engine.engine import Engine
from lightning_zinf.optim.binding import OptimizerBinding, binding_of, rule_of, unbind
from lightning_zinf.optim.update import Rule


class _Keep:
    """Stands for: the optimizer is bound already, leave it."""


KEEP = _Keep()
State = dict[str, Any] | None


def states_to_keep(optimizers: Sequence[Optimizer], engine: Engine | None) -> list[State | _Keep]:
    """Return for each optimizer the state it has: None if it has none, KEEP if ``engine`` has it already.

    Args:
        optimizers: The user's optimizers.
        engine: The engine that they will be bound to, if it exists.
    """
    states: list[State | _Keep] = []
    for optimizer in optimizers:
        binding = _binding(optimizer)
        if binding is None:
            states.append(optimizer.state_dict() if optimizer.state else None)
        else:
            states.append(KEEP if binding.engine is engine else optimizer.state_dict())
    return states


def rules_of(optimizers: Sequence[Optimizer]) -> list[Rule]:
    """Return what the steps of each optimizer do.

    Raises:
        ValueError: If one cannot work on shards.
    """
    bindings = map(_binding, optimizers)
    return [rule_of(o) if b is None else b.rule for o, b in zip(optimizers, bindings, strict=True)]


def planes_of(optimizers: Sequence[Optimizer], rules: Sequence[Rule]) -> dict[int, tuple[str, ...]]:
    """Return the names of the planes that are kept for each parameter, by its ``id``."""
    return {
        id(p): rule.planes(group)
        for optimizer, rule in zip(optimizers, rules, strict=True)
        for group in optimizer.param_groups
        for p in group["params"]
    }


def bind_all(
    optimizers: Sequence[Optimizer], rules: Sequence[Rule], engine: Engine, states: Sequence[State | _Keep]
) -> None:
    """Bind optimizers to an engine, with the states that :func:`states_to_keep` returned."""
    for optimizer, rule, state in zip(optimizers, rules, states, strict=True):
        if isinstance(state, _Keep):
            continue
        if _binding(optimizer) is not None:
            unbind(optimizer)
        optimizer.state.clear()
        binding = OptimizerBinding(optimizer, engine, rule)
        binding.zero_grad()
        if state is None and not _stepped(optimizer, engine):
            continue
        # The engine may have moments of an optimizer before this one.
        optimizer.load_state_dict({"state": {}, "param_groups": _packed(optimizer)} if state is None else state)


def _binding(optimizer: Optimizer) -> OptimizerBinding | None:
    try:
        return binding_of(optimizer)
    except ValueError:
        return None


def _packed(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{**group, "params": list(range(len(group["params"])))} for group in optimizer.param_groups]


def _stepped(optimizer: Optimizer, engine: Engine) -> bool:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if any(buffer.steps[index] for _, buffer, index in engine.places_of(param)):
                return True
    return False
