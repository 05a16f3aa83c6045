"""How a model is cut into units."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import GPT, ZOO, Block
from torch import nn

from lightning_zinf.engine.units import SMALL, UnitPlan, find_units

MANY = 2**30


def names(root: nn.Module, unit_bytes: int = MANY, classes: tuple[str, ...] = ()) -> list[str]:
    return [plan.name for plan in find_units(root, unit_bytes, classes)]


def owned(root: nn.Module, unit_bytes: int = MANY, classes: tuple[str, ...] = ()) -> dict[str, list[str]]:
    return {plan.name: [name for name, _ in plan.params] for plan in find_units(root, unit_bytes, classes)}


def assert_each_parameter_once(root: nn.Module, plans: list[UnitPlan]) -> None:
    found = [(name, id(param)) for plan in plans for name, param in plan.params]
    assert len({key for _, key in found}) == len(found)
    assert {key for _, key in found} == {id(p) for p in root.parameters()}
    by_name = dict(root.named_parameters(remove_duplicate=False))
    assert all(id(by_name[name]) == key for name, key in found)


class Holder(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def linear(kib: int) -> nn.Linear:
    return nn.Linear(256, kib, bias=False)  # as many KiB


@pytest.mark.parametrize("unit_bytes", [1, 4096, 2**16, MANY])
@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_in_one_unit_and_the_root_is_last(name: str, unit_bytes: int) -> None:
    model = ZOO[name].make()
    plans = find_units(model, unit_bytes, ZOO[name].units)
    assert_each_parameter_once(model, plans)
    assert plans[-1].module is model
    assert [plan.name for plan in plans].count("") == 1
    assert all(plan.params for plan in plans[:-1])
    assert all(model.get_submodule(plan.name) is plan.module for plan in plans)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    assert [plan.name for plan in plans[:-1]] == sorted((plan.name for plan in plans[:-1]), key=order.__getitem__)


def test_repeated_blocks_of_a_list_are_units_whatever_their_size() -> None:
    assert names(GPT(3)) == ["blocks.0", "blocks.1", "blocks.2", ""]
    assert names(GPT(1)) == [""]  # nothing is repeated


def test_repeated_children_of_a_sequential_are_units() -> None:
    model = nn.Sequential(linear(1), nn.ReLU(), linear(1), nn.LayerNorm(1))
    assert names(model) == ["0", "2", ""]
    assert owned(model)[""] == ["3.weight", "3.bias"]


def test_repeated_values_of_a_dict_are_units() -> None:
    assert names(Holder(experts=nn.ModuleDict({"a": linear(1), "b": linear(1)}))) == ["experts.a", "experts.b", ""]


def test_modules_without_parameters_are_no_blocks() -> None:
    assert names(nn.Sequential(nn.ReLU(), nn.ReLU(), linear(1))) == [""]


def test_blocks_are_found_deep_inside() -> None:
    model = Holder(body=Holder(encoder=Holder(layers=nn.ModuleList([Block(), Block()]), norm=nn.LayerNorm(8))))
    assert names(model) == ["body.encoder.layers.0", "body.encoder.layers.1", ""]
    assert owned(model)[""] == ["body.encoder.norm.weight", "body.encoder.norm.bias"]


def test_lists_in_a_list_are_looked_into() -> None:
    model = nn.ModuleList([nn.ModuleList([linear(1), linear(1)]), nn.ModuleList([linear(1), linear(1)])])
    assert names(model) == ["0.0", "0.1", "1.0", "1.1", ""]


def test_a_large_subtree_is_one_unit_up_to_the_size_asked_for() -> None:
    model = Holder(body=Holder(a=linear(100), b=linear(100)))
    assert names(model, 200 * 1024) == ["body", ""]
    assert names(model, 200 * 1024 - 1) == ["body.a", "body.b", ""]


def test_a_module_without_children_is_a_unit_whatever_its_size() -> None:
    assert names(Holder(only=linear(100)), 1) == ["only", ""]


def test_what_is_small_joins_the_root() -> None:
    small, large = linear(SMALL // 1024 - 1), linear(SMALL // 1024)
    assert owned(Holder(small=small, large=large)) == {"large": ["large.weight"], "": ["small.weight"]}


def test_classes_that_the_user_names_are_units() -> None:
    assert names(GPT(2), classes=("Embedding",)) == ["embed", "blocks.0", "blocks.1", ""]
    assert names(Holder(small=linear(1), other=nn.LayerNorm(8)), classes=("Linear",)) == ["small", ""]


@pytest.mark.parametrize("build", [lambda: GPT(2), lambda: Holder(body=Holder(a=linear(100), norm=nn.LayerNorm(8)))])
def test_classes_that_the_user_names_are_units_wherever_they_are(build: Callable[[], nn.Module]) -> None:
    model = build()
    wanted = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert set(wanted) <= set(names(model, classes=("LayerNorm",)))


@pytest.mark.parametrize("classes", [("Nope",), ("Linear", "Nope", "linear")])
def test_an_unknown_class_is_refused_by_name(classes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"no module of class 'Nope'.*, but of GPT, .*Linear"):
        find_units(GPT(2), MANY, classes)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = nn.Parameter(torch.zeros(3))


def test_nested_units_each_have_their_own() -> None:
    model = Holder(a=Outer(Outer(linear(1))))
    assert owned(model, classes=("Outer", "Linear")) == {
        "a": ["a.weight"],
        "a.inner": ["a.inner.weight"],
        "a.inner.inner": ["a.inner.inner.weight"],
        "": [],
    }
    assert owned(model, classes=("Outer",)) == {
        "a": ["a.weight"],
        "a.inner": ["a.inner.weight", "a.inner.inner.weight"],
        "": [],
    }


def test_tied_parameters_have_one_owner() -> None:
    model = GPT(2)
    plans = find_units(model, MANY, ("Embedding",))
    assert_each_parameter_once(model, plans)
    assert [plan.name for plan in plans if any(p is model.head.weight for _, p in plan.params)] == ["embed"]


def test_a_weight_tied_between_blocks_has_one_owner() -> None:
    model = nn.Sequential(linear(1), linear(1))
    model[1].weight = model[0].weight
    assert owned(model) == {"0": ["0.weight"], "": []}


def test_a_module_that_is_used_twice_is_one_unit() -> None:
    block = linear(1)
    model = nn.ModuleList([block, linear(1), block])
    plans = find_units(model, MANY)
    assert_each_parameter_once(model, plans)
    assert [plan.name for plan in plans] == ["0", "1", ""]


@pytest.mark.parametrize("container", ["list", "dict"])
def test_containers_of_parameters_belong_to_somebody(container: str) -> None:
    params = [nn.Parameter(torch.zeros(300, 300)) for _ in range(3)]
    held = (
        nn.ParameterList(params)
        if container == "list"
        else nn.ParameterDict({f"p{i}": p for i, p in enumerate(params)})
    )
    model = Holder(held=held, other=linear(1))
    plans = find_units(model, MANY)
    assert_each_parameter_once(model, plans)
    assert [plan.name for plan in plans] == [""]  # a container has no forward that could gather them


def test_a_model_without_parameters_has_an_empty_root() -> None:
    assert owned(nn.Sequential(nn.ReLU())) == {"": []}


def test_a_container_as_the_root_is_cut_too() -> None:
    assert names(nn.ModuleList([Block(), Block()])) == ["0", "1", ""]
