"""A model larger than its budget is built in pages, and nobody can tell from its values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from construction_models import SIDE, WEIGHT, Deep, expected_of, plain
from driver import CPU
from oracle import bits
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_zinf.config import IOConfig, MemoryConfig
from lightning_zinf.engine.construction import ConstructionPager, construction_budget, paged_construction
from lightning_zinf.engine.partition import PartitionConfig, partition
from lightning_zinf.parameters import Released

BUDGET = 2 * WEIGHT


def config_of(folder: Path, budget: int = BUDGET, offload: str = "nvme") -> PartitionConfig:
    memory = MemoryConfig(host_bytes=max(2 * budget, 8 * WEIGHT))
    return PartitionConfig(
        CPU, "32-true", offload, "cpu", (str(folder / "nvme"),), memory=memory, io=IOConfig(tile_numel=4096)
    )


@pytest.fixture
def pager_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], PartitionConfig]:
    """Return configs whose construction has just that budget."""

    def make(budget: int = BUDGET) -> PartitionConfig:
        monkeypatch.setattr("lightning_zinf.engine.construction.construction_budget", lambda config, ranks: budget)
        return config_of(tmp_path)

    return make


Make = Callable[[int], PartitionConfig]
MODELS = [Deep, plain, lambda: Deep(init=False)]


def assert_values(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert [name for name, _ in model.named_parameters()] == list(expected)
    for name, param in model.named_parameters():
        assert torch.equal(bits(param), bits(expected[name])), name


@pytest.mark.parametrize("build", MODELS)
def test_values_and_random_numbers_are_those_of_plain_construction(
    build: Callable[[], nn.Module], pager_of: Make
) -> None:
    expected, generator = expected_of(build)
    torch.manual_seed(3)
    with paged_construction(pager_of(BUDGET)) as pager:
        model = build()
    assert torch.equal(torch.get_rng_state(), generator)
    assert pager is not None
    assert pager.pages >= 4
    assert sum(isinstance(p, Released) for p in model.parameters()) >= 4
    assert pager.counters.nvme_write_bytes >= pager.pages * WEIGHT
    assert_values(model, expected)


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_partition_takes_the_pages_over_and_retires_them(
    build: Callable[[], nn.Module], precision: str, pager_of: Make, tmp_path: Path
) -> None:
    expected, _ = expected_of(build)
    torch.manual_seed(3)
    config = pager_of(BUDGET)
    with paged_construction(config) as pager:
        model = build()
    assert pager is not None
    store = pager.context.nvme
    engine = partition(model, PartitionConfig(**{**vars(config), "precision": precision}), list(model.parameters()))
    assert pager.pages == 0
    assert not pager.context.has_nvme
    assert store.volumes == []
    assert_values(model, expected)
    engine.dissolve()
    assert_values(model, expected)
    assert list((tmp_path / "nvme").iterdir()) == []


def test_a_model_partitioned_into_memory_retires_its_pages_too(pager_of: Make) -> None:
    expected, _ = expected_of(Deep)
    torch.manual_seed(3)
    config = pager_of(BUDGET)
    with paged_construction(config) as pager:
        model = Deep()
    engine = partition(model, PartitionConfig(**{**vars(config), "offload_params": "none"}), [])
    assert pager is not None
    assert pager.pages == 0
    assert_values(model, expected)
    engine.context.close()


def test_tied_weights_stay_one_parameter(pager_of: Make) -> None:
    with paged_construction(pager_of(BUDGET)):
        model = Deep(init=False)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed.weight, Released)


def test_nothing_is_written_below_the_budget(pager_of: Make, tmp_path: Path) -> None:
    with paged_construction(pager_of(100 * WEIGHT)) as pager:
        model = Deep()
    assert pager is not None
    assert (pager.pages, pager.counters.nvme_write_bytes) == (0, 0)
    assert not any(isinstance(p, Released) for p in model.parameters())
    assert not (tmp_path / "nvme").exists()


def test_what_was_built_and_dropped_costs_no_page(pager_of: Make) -> None:
    with paged_construction(pager_of(BUDGET)) as pager:
        for _ in range(10):
            nn.Linear(SIDE, SIDE)
    assert pager is not None
    assert pager.pages == 0


def build_and_fail(config: PartitionConfig) -> None:
    with paged_construction(config):
        model = plain()
        assert any(isinstance(p, Released) for p in model.parameters())
        raise RuntimeError("stop")


def test_an_exception_inside_leaves_nothing_behind(pager_of: Make, tmp_path: Path) -> None:
    hooks = torch_module._global_parameter_registration_hooks
    before = dict(hooks)
    with pytest.raises(RuntimeError, match="stop"):
        build_and_fail(pager_of(BUDGET))
    assert dict(hooks) == before
    assert not any(isinstance(p, Released) for p in plain().parameters())
    assert list((tmp_path / "nvme").iterdir()) == []


@pytest.mark.parametrize("weights", [1, 2, 5])
def test_memory_is_bounded_while_a_model_is_built(
    weights: int, pager_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters that are ordinary have the budget; pages that came back have as much, and one page."""
    peaks: list[int] = []
    original = ConstructionPager.seen

    def seen(self: ConstructionPager, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, module, name, param)
        live = [p for ref in self._live.values() if (p := ref()) is not None]
        assert self._live_bytes >= sum(p.nbytes for p in live)
        peaks.append(sum(p.nbytes for p in live))

    monkeypatch.setattr(ConstructionPager, "seen", seen)
    with paged_construction(pager_of(weights * WEIGHT)) as pager:
        Deep()
    assert pager is not None
    assert max(peaks) <= weights * WEIGHT
    ring = pager.context.ring
    assert ring.peak <= (weights + 1) * WEIGHT
    assert ring.total <= WEIGHT  # the model is built: one page at a time


def test_a_parameter_larger_than_the_budget_can_be_built(pager_of: Make) -> None:
    expected, _ = expected_of(plain)
    torch.manual_seed(3)
    with paged_construction(pager_of(WEIGHT // 2)) as pager:
        model = plain()
    assert pager is not None
    assert pager.pages == 7
    assert_values(model, expected)


def test_a_change_to_a_page_after_construction_is_kept(pager_of: Make) -> None:
    with paged_construction(pager_of(BUDGET)):
        model = plain()
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.fill_(number)
    assert [float(p.detach().mean()) for p in model.parameters()] == list(range(16))


@pytest.mark.parametrize(
    ("offload", "host_bytes", "expected"),
    [("none", None, None), ("cpu", None, None), ("nvme", 10 * 2**20, 5 * 2**20), ("nvme", 2**10, 64 * 2**10)],
)
def test_budget_of_construction(offload: str, host_bytes: int | None, expected: int | None) -> None:
    config = PartitionConfig(CPU, "32-true", offload, memory=MemoryConfig(host_bytes=host_bytes))  # type: ignore[arg-type]
    assert construction_budget(config) == expected


def test_weights_that_stay_in_memory_are_not_watched(tmp_path: Path) -> None:
    hooks = torch_module._global_parameter_registration_hooks
    before = len(hooks)
    with paged_construction(config_of(tmp_path, offload="none")) as pager:
        assert pager is None
        assert len(hooks) == before


def test_two_pages_in_one_operation_do_not_drive_each_other_out(pager_of: Make) -> None:
    expected, _ = expected_of(plain)
    torch.manual_seed(3)
    with paged_construction(pager_of(WEIGHT // 2)), torch.no_grad():
        model = plain()
        model[0].weight.sum()  # here when the next line begins, and the other is not
        both = model[0].weight + model[1].weight
        three = torch.stack([model[1].weight, model[4].weight, model[0].weight])
    assert torch.equal(both, expected["0.weight"] + expected["1.weight"])
    assert torch.equal(three, torch.stack([expected["1.weight"], expected["4.weight"], expected["0.weight"]]))


def test_pages_that_are_made_another_dtype_keep_it(pager_of: Make) -> None:
    expected = {name: value.to(torch.bfloat16) for name, value in expected_of(plain)[0].items()}
    torch.manual_seed(3)
    with paged_construction(pager_of(BUDGET)) as pager:
        model = plain().to(torch.bfloat16)
    assert pager is not None
    assert pager.pages
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, param in model.named_parameters():
        assert torch.equal(param.view(torch.int16), expected[name].view(torch.int16)), name


def test_a_parameter_whose_memory_is_used_elsewhere_stays_ordinary(pager_of: Make) -> None:
    with paged_construction(pager_of(BUDGET)) as pager:
        first = nn.Linear(SIDE, SIDE)
        kept = first.weight.data
        model = nn.Sequential(first, *plain())
        kept.fill_(7.0)
    assert pager is not None
    assert pager.pages
    assert bool((model[0].weight == 7.0).all())
