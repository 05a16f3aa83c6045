"""``zinf plan``: does a model fit a machine, where does everything live, and how long does a step take."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_zinf.config import nvme_paths

if TYPE_CHECKING:
    from lightning_zinf.memory.planner import Machine, ModelSpec, PlanOptions, Rates
    from lightning_zinf.planning.from_run import EarlierRun
    from lightning_zinf.planning.lightning_config import Run

_EXAMPLE = """\
  $ zinf plan --layers 32 --hidden 4096 --heads 32 --vocab 32000 --seq 2048
  $ zinf plan config.json --cluster configs/clusters/dgx2.yaml --batch 4 --recompute
  $ zinf plan configs/gpt_nvme.yaml --model-class examples/gpt/module.py:GPTModule --plot plan.png"""


def add_plan(commands: Any, size: Callable[[str], int]) -> None:
    """Add the command to the parser.

    Args:
        commands: The parser's commands.
        size: Reads a number of bytes.
    """
    command = commands.add_parser(
        "plan",
        help="say whether a model fits, where everything lives and how long a step takes",
        description="Say whether a model fits a machine, where everything lives, what a step moves and how long it "
        "takes. Nothing is built in memory.",
        epilog=f"examples:\n{_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(command.add_argument)
    _add_training(command.add_argument, size)
    _add_machine(command.add_argument, size)
    command.add_argument("--json", action="store_true", help="print JSON on stdout")
    text = "write a picture of memory by tier and of step time against batch (.png)"
    command.add_argument("--plot", metavar="FILE", help=text)


def _add_model(option: Callable[..., Any]) -> None:
    option("config", nargs="?", help="a LightningCLI .yaml, or a Hugging Face config.json or its folder")
    option(
        "--model-class", metavar="CLASS", help="the model of a .yaml that has no class_path: pkg.Class or file.py:Class"
    )
    for name, text in (
        ("layers", "blocks"),
        ("hidden", "width"),
        ("heads", "attention heads"),
        ("kv-heads", "heads of keys and values"),
        ("ffn", "width of the perceptron (4 x hidden)"),
        ("vocab", "tokens of the vocabulary; 0 leaves the embedding out (50257)"),
    ):
        option(f"--{name}", type=int, metavar="N", help=f"a transformer's {text}")
    option("--seq", type=int, metavar="N", help="tokens of a sample")


def _add_training(option: Callable[..., Any], size: Callable[[str], int]) -> None:
    option("--batch", type=int, metavar="N", help="samples of a micro-batch of one rank (1)")
    option("--accumulate", type=int, metavar="N", help="micro-batches of a step (1)")
    option("--precision", choices=("32-true", "bf16-mixed", "bf16-true", "16-mixed"), help="(bf16-mixed)")
    option("--stage", type=int, choices=(1, 2, 3), help="(3)")
    for name in ("params", "optimizer"):
        option(f"--offload-{name}", choices=("auto", "none", "cpu", "nvme"), help="(auto)")
    option("--recompute", action="store_true", help="recompute blocks in backward (activation checkpointing)")
    option("--offload-activations", choices=("none", "cpu", "nvme"), help="where what waits for backward goes (none)")
    option("--units", choices=("blocks", "linear"), default="blocks", help="what is gathered together")
    option("--max-tile-bytes", type=size, metavar="SIZE", help="what if larger linear layers were cut into tiles")
    option(
        "--from-run",
        metavar="PATH",
        help="take activations as a run of the model has measured them: its zinf_plan.json, or the folder of it",
    )
    option("--clip", action="store_true", help="gradients are clipped by their norm, so updates wait for all of them")
    option(
        "--update",
        choices=("after", "deferred", "backward"),
        help="what if updates ran then; by default as the engine does it",
    )


def _add_machine(option: Callable[..., Any], size: Callable[[str], int]) -> None:
    option("--host-bytes", type=size, metavar="SIZE", help="as memory.host_bytes")
    option("--device-bytes", type=size, metavar="SIZE", help="as memory.device_bytes")
    option("--cluster", metavar="FILE", help="plan for the machines of this .yaml; by default for this one")
    option("--nodes", type=int, metavar="N", help="number of nodes")
    option("--devices", type=int, metavar="N", help="ranks on this machine (1)")
    text = "folder on this machine's disk, by default $ZINF_NVME_PATH, else ./zinf_nvme; once for each of several disks"
    option("--nvme-path", action="append", help=text)


@dataclass(frozen=True)
class _Asked:
    """What is to be planned, from the command line and the configuration."""

    model: ModelSpec
    finer: ModelSpec | None
    options: PlanOptions
    devices: int
    nodes: int | None
    run: EarlierRun | None = None


def plan(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the command.

    Raises:
        ValueError: If what is given cannot be used.
        OSError: If a file cannot be read or written.
    """
    from lightning_zinf.memory.planner import make_plan
    from lightning_zinf.memory.planner.suggest import nearest_changes
    from lightning_zinf.planning.clusters import load_cluster
    from lightning_zinf.planning.plot import PlotError, draw
    from lightning_zinf.planning.report import report

    asked = _asked(given)
    notes: list[str] = []
    if given.cluster:
        machine = load_cluster(given.cluster)
    else:
        machine, notes = this_machine(given.nvme_path, asked.devices, asked.model)
    if asked.nodes:
        machine = machine.with_nodes(asked.nodes)
    if given.max_tile_bytes:
        notes.append(f"what if: linear layers of more than {given.max_tile_bytes:,} bytes were cut into tiles")
    if asked.run is not None:
        notes.append(
            f"activations are those that the run of {asked.run.path} has measured, batch by batch in proportion"
        )
    made = make_plan(asked.model, machine, asked.options)
    changes = [] if made.fits else nearest_changes(asked.model, machine, asked.options, asked.finer)
    if given.plot:
        try:
            draw(made, given.plot)
        except PlotError as error:
            raise ValueError(str(error)) from error
        notes.append(f"the picture is in {given.plot}")
    told = made.told()
    told["notes"] = notes
    told["changes"] = [
        {"what": c.what, "seconds": None if c.plan.prediction is None else c.plan.prediction.seconds} for c in changes
    ]
    return told, report(made, changes, notes)


# ---------------------------------------------------------------------- the model


def _asked(given: argparse.Namespace) -> _Asked:
    from lightning_zinf.memory.planner import PlanOptions

    run = _run_of(given)
    strategy: dict[str, Any] = {} if run is None else run.strategy
    memory = strategy.get("memory")
    memory = memory.get("init_args", memory) if isinstance(memory, dict) else {}
    precision = given.precision or ("bf16-mixed" if run is None else run.precision)
    model, finer = _models(given, run, precision)
    earlier = None
    if given.from_run:
        earlier = _earlier(given, strategy)
        model, finer = earlier.put_into(model), None
    options = PlanOptions(
        offload_params=given.offload_params or strategy.get("offload_params", "auto"),
        offload_optimizer=given.offload_optimizer or strategy.get("offload_optimizer", "auto"),
        stage=given.stage or strategy.get("stage", 3),
        batch=given.batch or (run.batch if run is not None and run.batch else earlier.kept.samples if earlier else 1),
        accumulate=given.accumulate or (1 if run is None else run.accumulate),
        recompute=_recompute(given, strategy) if earlier is None else bool(earlier.options["recompute"]),
        offload_activations=_offload(given, strategy) if earlier is None else earlier.options["offload_activations"],
        host_bytes=given.host_bytes or memory.get("host_bytes"),
        device_bytes=given.device_bytes or memory.get("device_bytes"),
        clip=given.clip or (run is not None and run.clip),
        update=given.update,
    )
    devices = given.devices or (run.devices if run is not None and run.devices else 1)
    return _Asked(model, finer, options, devices, given.nodes or (run.nodes if run is not None else None), earlier)


def _recompute(given: argparse.Namespace, strategy: dict[str, Any]) -> bool:
    return given.recompute or bool(strategy.get("activation_checkpointing"))


def _offload(given: argparse.Namespace, strategy: dict[str, Any]) -> Any:
    return given.offload_activations or strategy.get("offload_activations", "none")


def _earlier(given: argparse.Namespace, strategy: dict[str, Any]) -> EarlierRun:
    """Read the run whose activations are to be taken, which must have kept them as is asked for now."""
    from lightning_zinf.planning.from_run import read_run

    earlier = read_run(given.from_run)
    for option, asked in (
        ("recompute", _recompute(given, strategy) or None),
        ("offload_activations", given.offload_activations or strategy.get("offload_activations")),
    ):
        had = earlier.options.get(option)
        if asked is not None and asked != had:
            raise ValueError(
                f"{given.from_run} was measured with {option}={had!r}, and {option}={asked!r} is asked for: what is "
                "kept for backward is another amount then, so plan without --from-run or take a run with that option"
            )
    return earlier


def _run_of(given: argparse.Namespace) -> Run | None:
    from lightning_zinf.planning.lightning_config import read_run

    by_shape = [f"--{n}" for n in ("layers", "hidden", "heads") if getattr(given, n) is not None]
    if given.config and by_shape:
        raise ValueError(f"give either a configuration or {', '.join(by_shape)}")
    if not given.config and len(by_shape) < 3:
        raise ValueError("give a LightningCLI .yaml, a Hugging Face config.json, or --layers, --hidden and --heads")
    if given.config and given.config.endswith((".yaml", ".yml")):
        return read_run(given.config)
    return None


def _models(given: argparse.Namespace, run: Run | None, precision: Any) -> tuple[ModelSpec, ModelSpec | None]:
    """Return the model, and the same in smaller units if it can be cut further."""
    from lightning_zinf.memory.planner import Shape, model_of
    from lightning_zinf.planning import hugging_face

    if run is not None:
        return _lightning_model(given, run, precision), None
    encoder = None
    if given.config:
        config = hugging_face.read_config(given.config)
        if not hugging_face.known(config["model_type"]) and _has_transformers():
            from lightning_zinf.planning.modules import from_transformers

            return from_transformers(config, precision, given.seq or 1024), None
        shape, encoder = hugging_face.shapes_of(config, given.seq)
    else:
        shape = Shape(
            given.layers,
            given.hidden,
            given.heads,
            vocab=50257 if given.vocab is None else given.vocab,
            seq=given.seq or 1024,
            ffn=given.ffn,
            kv_heads=given.kv_heads,
            name=f"transformer of {given.layers} blocks of {given.hidden}",
        )
    tiled = given.max_tile_bytes
    finer = model_of(shape, precision, encoder=encoder, finer=True, tile_bytes=tiled)
    if given.units == "linear" or tiled:
        return finer, None
    return model_of(shape, precision, encoder=encoder), finer


def _has_transformers() -> bool:
    import importlib.util

    return importlib.util.find_spec("transformers") is not None


def _lightning_model(given: argparse.Namespace, run: Run, precision: Any) -> ModelSpec:
    from lightning_zinf.planning.modules import build_on_meta, describe_module, import_class

    name = given.model_class or run.class_path
    if name is None:
        raise ValueError(
            f"{given.config}: the model has no class_path, since the program names it: say which with --model-class, "
            "such as my_package.MyModel or path/to/file.py:MyModel"
        )
    memory = run.strategy.get("memory")
    memory = memory.get("init_args", memory) if isinstance(memory, dict) else {}
    module = build_on_meta(import_class(name), run.arguments)
    return describe_module(
        module,
        precision,
        name=name.rpartition(":")[2].rpartition(".")[2],
        tokens=given.seq,
        unit_bytes=memory.get("unit_bytes"),
        units=run.strategy.get("units") or (),
    )


# ---------------------------------------------------------------------- the machine


def this_machine(nvme_path: Sequence[str] | None, devices: int, model: ModelSpec) -> tuple[Machine, list[str]]:
    """Return this machine as it is now, with the rates that ``zinf bench`` has found, and notes for the reader.

    Args:
        nvme_path: Folders on disks.
        devices: Ranks.
        model: What is to be trained, which decides by its dtype which rate of compute counts.
    """
    import platform

    import torch

    from lightning_zinf.memory.machine import free_device_bytes, free_disk_bytes, free_host_bytes
    from lightning_zinf.memory.planner import Machine, Rates
    from lightning_zinf.planning.cache import StaleError, load

    folders = [Path(folder).absolute() for folder in nvme_paths(nvme_path, "")]
    cuda = torch.cuda.is_available()
    notes = [f"memory and disk as they are free now; the disk is that of {', '.join(map(str, folders))}"]
    rates = Rates()
    try:
        measured = load()
        rates = _shared(measured.rates, devices, model, cuda)
        if [_device_of(f) for f in folders] != [_device_of(Path(f)) for f in measured.folder.split(os.pathsep)]:
            notes.append(f"zinf bench measured the disk of {measured.folder}, which is another one")
            rates = replace(rates, nvme_read=None, nvme_write=None, nvme_mixed=None)
    except StaleError as error:
        notes.append(str(error))
    machine = Machine(
        platform.node() or "this machine",
        free_device_bytes(torch.device("cuda")) if cuda else 0,
        free_host_bytes(),
        len(folders) * min(map(free_disk_bytes, folders)),  # striped evenly, so the fullest limits
        rates,
        ranks_per_node=devices,
        aliased=not cuda,
    )
    return machine, notes


def _device_of(folder: Path) -> int:
    return os.stat(next(p for p in (folder, *folder.parents) if p.exists())).st_dev


def _shared(measured: dict[str, float], devices: int, model: ModelSpec, cuda: bool) -> Rates:
    """Return one rank's share of what the machine does: on a CPU all ranks share all of it."""
    from lightning_zinf.memory.planner import Rates

    widths = {b.weight_bytes for u in model.units for b in u.buffers}
    found = {k: v for k, v in measured.items() if not k.startswith("flops")}
    compute = measured.get("flops_fp32" if widths == {4} else "flops_bf16")
    if compute:
        found["flops"] = compute if cuda else compute / devices
    known = {k: v / devices if k.startswith(("nvme", "adam", "host_copy")) else v for k, v in found.items()}
    if devices == 1:
        known.pop("gather", None)
    fields = set(Rates.__dataclass_fields__)
    return Rates(**{k: v for k, v in known.items() if k in fields})
