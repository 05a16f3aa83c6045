"""What a LightningCLI configuration says of a run, read without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning_zinf_boot
from lightning_zinf.planning.hugging_face import ConfigError

_PRECISIONS = {
    None: "32-true",
    "32": "32-true",
    "32-true": "32-true",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-true",
    "16": "16-mixed",
    "16-mixed": "16-mixed",
}


@dataclass(frozen=True)
class Run:
    """What a configuration says, as far as it decides a plan; what it leaves out is None.

    Attributes:
        class_path: The model's class.
        arguments: What it is built with.
        precision: As the Trainer's option.
        accumulate: Micro-batches of a step.
        batch: Samples of a micro-batch.
        devices: Ranks of a node.
        nodes: Nodes.
        clip: Whether gradients are clipped by their norm.
        strategy: Options of the strategy.
    """

    class_path: str | None
    arguments: dict[str, Any]
    precision: str
    accumulate: int = 1
    batch: int | None = None
    devices: int | None = None
    nodes: int = 1
    clip: bool = False
    strategy: dict[str, Any] = field(default_factory=dict)


def read_run(path: str) -> Run:
    """Read a LightningCLI configuration.

    Raises:
        ConfigError: If it is none.
        OSError: If it cannot be read.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not YAML: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("fit"), dict):
        data = data["fit"]
    if not isinstance(data, dict) or "model" not in data:
        raise ConfigError(f"{path}: there is no model in it, so it is no LightningCLI configuration")
    model, trainer, loader = (_mapping(data.get(k), f"{path}: {k}") for k in ("model", "trainer", "data"))
    arguments = _mapping(model.get("init_args"), f"{path}: model.init_args") if "class_path" in model else model
    precision = trainer.get("precision")
    if not (precision is None or str(precision) in _PRECISIONS):
        raise ConfigError(f"{path}: precision {precision!r} is not one that the strategy has")
    loader = _mapping(loader.get("init_args"), f"{path}: data.init_args") if "init_args" in loader else loader
    batch = loader.get("batch_size")
    return Run(
        class_path=model.get("class_path"),
        arguments=dict(arguments),
        precision=_PRECISIONS[precision if precision is None else str(precision)],
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        batch=batch if isinstance(batch, int) else None,
        devices=_devices(trainer.get("devices")),
        nodes=int(trainer.get("num_nodes") or 1),
        clip=bool(trainer.get("gradient_clip_val")) and trainer.get("gradient_clip_algorithm") != "value",
        strategy=_strategy(trainer.get("strategy")),
    )


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping, got {value!r}")
    return value


def _devices(value: object) -> int | None:
    if isinstance(value, list):
        return len(value)
    text = str(value)
    return int(text) if text.isdigit() and int(text) > 0 else None


def _strategy(value: object) -> dict[str, Any]:
    """Return the options of our strategy, by a preset's name or a class; of another one there are none."""
    if isinstance(value, dict):
        return dict(value.get("init_args") or {}) if "Zinf" in str(value.get("class_path")) else {}
    return dict(lightning_zinf_boot.PRESETS[value][1]) if value in lightning_zinf_boot.PRESETS else {}
