"""A plan as a picture: memory by tier, and step time against batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_zinf.memory.planner import Plan, make_plan


class PlotError(Exception):
    """There is nothing to plot with."""


def batches(plan: Plan, most: int = 64) -> list[Plan]:
    """Return the same plan for batches of 1, 2, 4 and so on."""
    sizes = [2**i for i in range(most.bit_length()) if 2**i <= most]
    return [make_plan(plan.model, plan.machine, replace(plan.options, batch=b)) for b in sizes]


def draw(plan: Plan, path: str, others: Sequence[Plan] | None = None) -> None:
    """Write a PNG.

    Args:
        plan: The plan.
        path: The file.
        others: The same plan with other batches; :func:`batches` of it by default.

    Raises:
        PlotError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "a plot needs matplotlib, which is not installed: pip install 'lightning-zinf[plot]'"
        ) from error
    others = batches(plan) if others is None else others
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(1, 2)
    _memory(memory, plan)
    _time(time, others)
    figure.suptitle(f"{plan.model.name}, {plan.model.numel / 1e9:.3g} G parameters, on {plan.machine.name}")
    figure.savefig(path, dpi=120, format="png")


def _memory(axes: object, plan: Plan) -> None:
    """Draw a bar for each tier, stacked from what takes memory there, as a share of what there is."""
    uses = plan.tiers
    names: list[str] = list(dict.fromkeys(i.what for i in plan.items))
    bottoms = [0.0] * len(uses)
    for name in names:
        heights = []
        for use in uses:
            many = 1 if use.tier == "device" else plan.machine.ranks_per_node
            heights.append(
                100.0 * many * sum(i.nbytes for i in plan.items if i.what == name and i.tier == use.tier)
                / max(1, use.available)
            )  # fmt: skip
        axes.bar([u.tier for u in uses], heights, bottom=bottoms, label=name)  # type: ignore[attr-defined]
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axes.axhline(100, color="black", linewidth=1)  # type: ignore[attr-defined]
    axes.set_ylabel("% of the tier's memory")  # type: ignore[attr-defined]
    axes.legend(fontsize=7)  # type: ignore[attr-defined]


def _time(axes: object, others: Sequence[Plan]) -> None:
    """Draw the step time and the bound of the busiest resource; what does not fit has a hollow mark."""
    timed = [(p.options.batch, p.prediction, p.fits) for p in others if p.prediction is not None]
    if not timed:
        axes.text(0.5, 0.5, "the machine's speeds are not known", ha="center")  # type: ignore[attr-defined]
        return
    sizes = [b for b, _, _ in timed]
    axes.plot(sizes, [p.seconds for _, p, _ in timed], "C0-", label="step")  # type: ignore[attr-defined]
    axes.plot(sizes, [p.bound for _, p, _ in timed], "C1--", label="busiest resource")  # type: ignore[attr-defined]
    for size, found, fits in timed:
        axes.plot(size, found.seconds, "C0o", fillstyle="full" if fits else "none")  # type: ignore[attr-defined]
    axes.set(xscale="log", yscale="log", xlabel="batch of a rank (hollow: does not fit)", ylabel="seconds")  # type: ignore[attr-defined]
    axes.legend(fontsize=7)  # type: ignore[attr-defined]
