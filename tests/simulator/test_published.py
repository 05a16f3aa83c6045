"""Published figures beside what the simulation computes; sources are in ``lightning_zinf/simulator/published.py``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lightning_zinf.memory.planner.schedule import run as simulate
from lightning_zinf.simulator import published as pub
from lightning_zinf.simulator import strategies as st

FIGURES = pub.figures()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.group}-{f.what}")
def test_computed_agrees_with_published(figure: pub.Figure) -> None:
    assert figure.tolerance <= (0.05 if figure.group == "DeepSpeed NVMe" else 0.15)
    assert figure.agrees, f"{figure.published} {figure.unit} published, {figure.computed:.4g} computed"


def test_everything_that_was_promised_is_compared() -> None:
    groups = [f.group for f in FIGURES]
    assert {g: groups.count(g) for g in set(groups)} == {
        "largest model": 8,
        "efficiency": 5,
        "Fig. 5a": 5,
        "Fig. 5b": 4,
        "DeepSpeed NVMe": 4,
    }


def test_shapes_have_the_parameters_of_their_names() -> None:
    names = {"0.5T": 0.5e12, "1T": 1e12, "5T": 5e12, "10T": 10e12, "20T": 20e12}
    assert {n: pub.MODELS[n].params for n in names} == {n: pytest.approx(p, rel=0.02) for n, p in names.items()}


def test_scaling_is_superlinear_and_so_is_the_papers() -> None:
    scaling = [f for f in FIGURES if f.group == "Fig. 5b"]
    assert scaling[-1].published > 8 * scaling[0].published
    assert scaling[-1].computed > 8 * scaling[0].computed


@given(
    some.sampled_from([8.0, 32.0]),
    some.floats(1e8, 1e13),
    some.sampled_from([1024.0, 2048.0, 16384.0]),
    some.integers(1, 9),
)
def test_efficiency_is_the_papers_formula(moved: float, bandwidth: float, tokens: float, layers: int) -> None:
    """Without overlap the simulation is ``ait * bw / (ait * bw + peak)``, ait being operations for each byte moved."""
    intensity = 8 * tokens / moved
    expected = intensity * bandwidth / (intensity * bandwidth + pub.PEAK)
    assert pub.efficiency(moved, bandwidth, tokens, layers) == pytest.approx(expected, rel=1e-6)


def test_deepspeed_moves_32_bytes_a_parameter() -> None:
    for nodes in (4, 32):
        run = st.Run(pub.MODELS["1T"], pub.dgx2(nodes), 5.0, "host", "nvme")
        loads, setting = st.loads_of(run)
        schedule, _ = simulate(loads, setting)
        disk = sum(u.gradient.nvme_write + u.update.nvme_read + u.update.nvme_write for u in loads)
        assert disk * run.machine.world_size == pytest.approx(32 * run.model.params)
        assert any(t.stage == "nvme_read" for t in schedule.tasks)


def test_states_go_where_there_is_room() -> None:
    places = {nodes: st.placed(pub.MODELS["1T"], pub.dgx2(nodes)) for nodes in (1, 4, 8, 16, 32)}
    assert places == {
        1: ("nvme", "nvme"),
        4: ("host", "nvme"),
        8: ("host", "nvme"),
        16: ("host", "nvme"),  # 24 TB, of which 80 % are less than 20 bytes a parameter
        32: ("host", "host"),
    }
    assert st.placed(pub.MODELS["0.5T"], pub.dgx2(32)) == ("device", "device")
