"""What is kept for backward: counted before a run, or measured in its first training step.

Note [Measured activations]
~~~~~~~~~~~~~~~~~~~~~~~~~~~
What a model keeps for backward is not known from its sizes. The engine has its first training micro-step measured
(``engine/profile.py``), and the plan that it was built by is completed by that: its memory has a row for activations
from then on. Where a step then needs more than there is, and the user has left the choice of tiers to us, the plan is
made again with that much less room for planes, so that fewer of them stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lightning_zinf.config import Tier
from lightning_zinf.memory.planner.model import ModelSpec, UnitSpec
from lightning_zinf.memory.planner.options import PlanOptions

_TIERS: dict[str, Tier] = {"none": "device", "cpu": "host", "nvme": "nvme"}


@dataclass(frozen=True)
class Kept:
    """Bytes that one micro-batch of a rank keeps for backward.

    Attributes:
        saved: Of each unit by its name, under the options of the run.
        staying: Those of them that stay on the device where activations are offloaded.
        samples: Samples of the micro-batch.
        grown: Whether it is what the memory in use has grown by, since tensors could not be told apart.
        device_peak: Most bytes of the accelerator's memory that tensors have taken so far, of any kind; 0 on a CPU.
    """

    saved: Mapping[str, int]
    staying: Mapping[str, int]
    samples: int = 1
    grown: bool = False
    device_peak: int = 0

    @property
    def total(self) -> int:
        """Of all units."""
        return sum(self.saved.values())


def with_kept(model: ModelSpec, kept: Kept) -> ModelSpec:
    """Return a model whose activations are those that were measured.

    Units that are not named keep none; what units without parameters keep, which the model does not have, counts with
    the last one.
    """
    samples = max(1, kept.samples)
    names = {u.name for u in model.units}
    rest = [sum(n for name, n in each.items() if name not in names) for each in (kept.saved, kept.staying)]
    units = []
    for unit in model.units:
        saved, staying = (
            each.get(unit.name, 0) + (left if unit is model.units[-1] else 0)
            for each, left in zip((kept.saved, kept.staying), rest, strict=True)
        )
        units.append(replace(unit, saved_bytes=saved / samples, staying_bytes=staying / samples, input_bytes=0.0))
    return replace(model, units=tuple(units), measured=True, profiled=True)


def kept_bytes(unit: UnitSpec, *, recompute: bool) -> float:
    """Return the bytes that a unit keeps of a sample for backward: its input if it is recomputed, else all."""
    return unit.input_bytes if recompute and unit.block else unit.saved_bytes


def leaving_bytes(model: ModelSpec, unit: UnitSpec, options: PlanOptions) -> float:
    """Return the bytes of a micro-batch that a unit keeps, and that go where ``offload_activations`` says."""
    kept = kept_bytes(unit, recompute=options.recompute and not model.profiled)
    return options.batch * (kept - (unit.staying_bytes if options.offload_activations != "none" else 0.0))


def activations(model: ModelSpec, options: PlanOptions) -> Iterator[tuple[str, Tier, float]]:
    """Yield ``(what, tier, bytes)`` of what waits for backward, and of a unit's while it is used."""
    where, batch = _TIERS[options.offload_activations], options.batch
    recompute = options.recompute and not model.profiled  # else what was measured is what is left with it
    name = "inputs of recomputed units" if options.recompute else "activations"
    staying = sum(u.staying_bytes for u in model.units) if where != "device" else 0.0
    yield name, where, sum(leaving_bytes(model, u, options) for u in model.units)
    yield "activations that stay", "device", batch * staying
    if recompute or where != "device":
        yield "activations of a unit", "device", batch * max((u.saved_bytes for u in model.units), default=0)


def reserved(model: ModelSpec, options: PlanOptions, *, aliased: bool) -> dict[Tier, int]:
    """Return the bytes of each tier that measured activations take; what was only counted reserves nothing."""
    taken: dict[Tier, int] = {"device": 0, "host": 0, "nvme": 0}
    for _, tier, nbytes in activations(model, options) if model.profiled else ():
        taken["host" if aliased and tier == "device" else tier] += int(nbytes)
    return taken
