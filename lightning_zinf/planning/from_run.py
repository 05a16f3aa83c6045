"""The activations that an earlier run measured, for a plan of the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from lightning_zinf.memory.planner import Kept, ModelSpec
from lightning_zinf.memory.planner.kept import with_kept
from lightning_zinf.planning.store import FILE


@dataclass(frozen=True)
class EarlierRun:
    """What the ``zinf_plan.json`` of a run says of its first training step.

    Attributes:
        path: Where that was read.
        parameters: Number of parameters of its model.
        options: Its options, by the names of ``PlanOptions``.
        kept: What its first micro-batch kept for backward.
    """

    path: str
    parameters: int
    options: Mapping[str, Any]
    kept: Kept

    def put_into(self, model: ModelSpec) -> ModelSpec:
        """Return a model with the activations of this run.

        Where it is cut into other units than the run's was, they are spread over its units by their parameters: only
        the sum decides whether it fits.

        Raises:
            ValueError: If it is another model.
        """
        if model.numel != self.parameters:
            raise ValueError(
                f"{self.path} is of a run with {self.parameters:,} parameters, and this model has {model.numel:,}: "
                "what another model keeps for backward says nothing of this one"
            )
        names = [u.name for u in model.units]
        kept = self.kept
        if set(kept.saved) - set(names):
            total = max(1, model.numel)

            def spread(nbytes: int) -> dict[str, int]:
                return {u.name: round(nbytes * u.numel / total) for u in model.units}

            kept = Kept(spread(kept.total), spread(sum(kept.staying.values())), kept.samples)
        return with_kept(model, kept)


def read_run(path: str) -> EarlierRun:
    """Read the plan of a run.

    Args:
        path: ``zinf_plan.json`` or the folder that has it, or a URL that fsspec opens.

    Raises:
        ValueError: If it is no such file, or the run did not get to measure a step.
        OSError: If it cannot be read.
    """
    files, inner = fsspec.core.url_to_fs(path)
    if files.isdir(inner):
        inner = f"{inner.rstrip('/')}/{FILE}"
    with files.open(inner, "r") as file:
        try:
            data = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is no {FILE}: {error}") from None
    try:
        measured, options = data["activations_measured"], dict(data["options"])
        parameters = int(data["model"]["parameters"])
        if measured is None:
            raise ValueError(
                f"the run of {path} did not get to measure what a training step keeps for backward: it has to take one "
                "step without fast_dev_run"
            )
        saved = {str(u["unit"]): int(u["saved"]) for u in measured["units"]}
        staying = {str(u["unit"]): int(u["staying"]) for u in measured["units"]}
        return EarlierRun(path, parameters, options, Kept(saved, staying, int(measured["samples"])))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no {FILE} of this version: {error!r} is missing or not as expected") from None
