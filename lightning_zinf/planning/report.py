"""A plan as tables for people."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_zinf.memory.planner.plan import Plan
from lightning_zinf.memory.planner.suggest import Change, nearest_changes

_LINKS = {
    "nvme_read": "disk to memory",
    "nvme_write": "memory to disk",
    "host_to_device": "host to accelerator",
    "device_to_host": "accelerator to host",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
}
_SERVERS = {
    "cpu": "CPU (compute and update)",
    "device": "accelerator",
    "host": "update on the host",
    "nvme": "disk (reads and writes)",
    "nvme_read": "disk (reads)",
    "nvme_write": "disk (writes)",
    "host_to_device": "host to accelerator",
    "device_to_host": "accelerator to host",
    "gather": "links between ranks",
}


def human(nbytes: float) -> str:
    """Return a number of bytes for a reader."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= size / 10:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Return a time for a reader."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def memory_table(plan: Plan) -> Table:
    """Return what takes memory, tier by tier, with what is needed and available."""
    where = {"device": "a rank", "host": "a node", "nvme": "a node"}
    table = Table("tier", "what", "needed", "available", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for use in plan.tiers:
        many = 1 if use.tier == "device" else plan.machine.ranks_per_node
        for item in sorted((i for i in plan.items if i.tier == use.tier), key=lambda i: -i.nbytes):
            table.add_row("", item.what, human(item.nbytes * many), "")
        short = "" if use.fits else f"  {human(use.needed - use.available)} too little"
        table.add_row(use.tier, f"all, for {where[use.tier]}", human(use.needed), human(use.available) + short)
        table.add_section()
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def residency_table(plan: Plan) -> Table:
    """Return which plane of which units rests on which tier; neighbours that are alike share a row."""
    table = Table("units", "plane", "tier", "bytes of a rank", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for names, plane, tier, nbytes in _merged(plan):
        table.add_row(
            names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})", plane, tier, human(nbytes)
        )
    table.columns[3].justify = "right"
    return table


def _merged(plan: Plan) -> Iterator[tuple[list[str], str, str, int]]:
    planes = list(dict.fromkeys(plane for _, plane, _, _ in plan.residency()))
    for plane in planes:
        names: list[str] = []
        current, total = "", 0
        for unit, kind, tier, nbytes in plan.residency():
            if kind != plane:
                continue
            if names and tier != current:
                yield names, plane, current, total
                names, total = [], 0
            names, current, total = [*names, unit], tier, total + nbytes
        if names:
            yield names, plane, current, total


def traffic_table(plan: Plan) -> Table:
    """Return what a step of a rank moves over each link, and how long each resource is busy."""
    table = Table("link", "bytes of a step", "a parameter", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    share = max(1, plan.model.numel / plan.world_size)
    for link, nbytes in plan.traffic.told().items():
        if nbytes:
            table.add_row(_LINKS[link], human(nbytes), f"{nbytes / share:.2f} B")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _time_lines(plan: Plan) -> list[str]:
    found = plan.prediction
    if found is None:
        return ["step time: not predicted, since the speeds of this machine are not known"]
    lines = [
        f"step time: {duration(found.seconds)} for {plan.tokens:,} tokens; bound by {_SERVERS[found.binding]}, "
        f"busy {duration(found.bound)} of it"
    ]
    if plan.machine.rates.flops:
        samples = plan.options.batch * plan.options.accumulate
        operations = plan.model.operations(recompute=plan.options.recompute) * samples
        lines[0] += f"; {operations / found.seconds / 1e12:.3g} TFlop/s a rank"
    busy = sorted(found.busy.items(), key=lambda b: -b[1])
    lines.append("busy in a step: " + ", ".join(f"{_SERVERS[s]} {duration(t)}" for s, t in busy if t))
    return lines


def report(plan: Plan, changes: Sequence[Change] = (), notes: Sequence[str] = (), *, residency: bool = True) -> str:
    """Return the plan as text: whether it fits, what lies where, what moves, how long it takes, what to change."""
    out = _console()
    model, machine, options = plan.model, plan.machine, plan.options
    nodes = f"{_count(machine.nodes, 'node')} with {_count(machine.ranks_per_node, 'rank')}"
    out.print(f"{model.name}: {model.numel:,} parameters in {len(model.units)} units")
    out.print(f"{machine.name}: {nodes}; stage {options.stage}, batch {options.batch} x {options.accumulate} a rank")
    out.print("It fits." if plan.fits else "It does not fit." + (f" {plan.problem}." if plan.problem else ""))
    out.print()
    out.print(memory_table(plan))
    if residency:
        out.print(residency_table(plan))
    if any(plan.traffic.told().values()):
        out.print(traffic_table(plan))
    for line in _time_lines(plan):
        out.print(line)
    if options.update is not None:
        notes = [*notes, f"what if: updates {options.update}; the engine itself decides when they run"]
    if not model.measured:
        notes = [*notes, "activations are not known, so they are not counted"]
    for note in notes:
        out.print(f"note: {note}")
    if not plan.fits:
        out.print()
        out.print(
            "What would make it fit:" if changes else "No change of options or nodes that was tried makes it fit."
        )
        for change in changes:
            time = f" ({duration(change.plan.prediction.seconds)} a step)" if change.plan.prediction else ""
            out.print(f"  - {change.what}{time}")
    return _text(out)


def refusal(plan: Plan) -> str:
    """Return the table of a plan that does not fit, and what to change, for an error message."""
    changes = nearest_changes(plan.model, plan.machine, plan.options)
    lines = ["what would make it fit:", *(f"  - {c.what}" for c in changes)] if changes else []
    more = "activations come on top; a smaller model, or a machine with more memory, is needed in any case"
    return "\n".join([memory_text(plan), *(lines or [more])])


def memory_text(plan: Plan) -> str:
    """Return :func:`memory_table` as text."""
    out = _console()
    out.print(memory_table(plan))
    return _text(out)


def _console() -> Console:
    return Console(file=io.StringIO(), width=110, force_terminal=False, highlight=False, markup=False)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
