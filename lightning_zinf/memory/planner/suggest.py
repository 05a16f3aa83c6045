"""What to change when a model does not fit: the smallest changes that make it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lightning_zinf.memory.planner.machine import Machine, Rates
from lightning_zinf.memory.planner.model import ModelSpec
from lightning_zinf.memory.planner.options import PlanOptions
from lightning_zinf.memory.planner.plan import Plan, make_plan

MOST_NODES = 4096


@dataclass(frozen=True)
class _Case:
    model: ModelSpec
    machine: Machine
    options: PlanOptions

    def fits(self) -> bool:
        return make_plan(self.model, replace(self.machine, rates=Rates()), self.options).fits

    def with_options(self, **changes: object) -> _Case:
        return replace(self, options=replace(self.options, **changes))  # type: ignore[arg-type]


Move = tuple[str, Callable[[_Case], _Case]]


@dataclass(frozen=True)
class Change:
    """A change, or several together.

    Attributes:
        what: What to do, for the reader.
        plan: The plan with it.
    """

    what: str
    plan: Plan


def nearest_changes(
    model: ModelSpec, machine: Machine, options: PlanOptions, finer: ModelSpec | None = None, most: int = 5
) -> list[Change]:
    """Return changes with which a model fits: single ones if there are any, else pairs, else more at once.

    Args:
        model: The model that does not fit.
        machine: The machine.
        options: The options that it does not fit with.
        finer: The same model cut into smaller units, if it can be.
        most: Number of changes to return.
    """
    start = _Case(model, machine, options)
    moves = _moves(start, finer)
    found: list[tuple[str, _Case]] = []
    for size in range(1, len(moves) + 1):
        for chosen in itertools.combinations(moves, size):
            case = _apply(start, chosen)
            if case.fits():
                found.append((" and ".join(text for text, _ in chosen), case))
        if found:
            break
    found += _batches(start)
    if len(found) < most:
        found += _nodes(start, "")
    if not found:  # everything at once
        least = _apply(start, moves).with_options(batch=1)
        texts = [text for text, _ in moves] + ["a batch of 1"] * (start.options.batch > 1)
        found += [(" and ".join(texts), least)] if least.fits() else _nodes(least, "".join(f" and {t}" for t in texts))
    return [Change(text, make_plan(c.model, c.machine, c.options)) for text, c in found[:most]]


def _apply(case: _Case, moves: Sequence[Move]) -> _Case:
    for _, move in moves:
        case = move(case)
    return case


def _moves(case: _Case, finer: ModelSpec | None) -> list[Move]:
    """Return what could be changed at all."""
    options, moves = case.options, list[Move]()
    if options.stage < 3:
        moves.append(("stage=3", lambda c: c.with_options(stage=3)))
    asked = (options.offload_params, options.offload_optimizer)
    if asked not in (("auto", "auto"), ("nvme", "nvme")):
        auto = ("offload_params='auto', offload_optimizer='auto'", {"stage": 3})
        moves.append((auto[0], lambda c: c.with_options(offload_params="auto", offload_optimizer="auto", **auto[1])))
    if asked != ("nvme", "nvme") and case.machine.nvme_bytes:
        text = "offload_params='nvme', offload_optimizer='nvme'"
        moves.append((text, lambda c: c.with_options(offload_params="nvme", offload_optimizer="nvme", stage=3)))
    if not options.recompute and any(u.input_bytes for u in case.model.units):
        moves.append(("activation_checkpointing=True", lambda c: c.with_options(recompute=True)))
    if options.offload_activations == "none" and not case.machine.aliased:
        moves.append(("offload_activations='cpu'", lambda c: c.with_options(offload_activations="cpu")))
    if options.offload_activations != "nvme" and case.machine.nvme_bytes:
        moves.append(("offload_activations='nvme'", lambda c: c.with_options(offload_activations="nvme")))
    if options.host_bytes or options.device_bytes:
        moves.append(("no memory.host_bytes and memory.device_bytes", _unbounded))
    if finer is not None:
        moves.append(("cut blocks into smaller units", lambda c: replace(c, model=finer)))
    return moves


def _unbounded(case: _Case) -> _Case:
    return case.with_options(host_bytes=None, device_bytes=None)


def _batches(start: _Case) -> list[tuple[str, _Case]]:
    """Return the largest smaller batch that fits."""
    batch = start.options.batch // 2
    while batch:
        case = start.with_options(batch=batch)
        if case.fits():
            return [(f"a batch of {batch} instead of {start.options.batch}", case)]
        batch //= 2
    return []


def _nodes(start: _Case, beside: str) -> list[tuple[str, _Case]]:
    """Return the least number of nodes that is enough, found by doubling and halving."""
    few, many = start.machine.nodes, 2 * start.machine.nodes

    def case(nodes: int) -> _Case:
        return replace(start, machine=start.machine.with_nodes(nodes))

    while many <= MOST_NODES and not case(many).fits():
        few, many = many, 2 * many
    if many > MOST_NODES:
        return []
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if case(middle).fits() else (middle, many)
    return [(f"{many} nodes instead of {start.machine.nodes}{beside}", case(many))]
