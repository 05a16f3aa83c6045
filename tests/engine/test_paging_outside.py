"""Code outside of a step finds ordinary parameters with the values of the masters, and its changes stay."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driver import Session, Where, session
from models import ZOO, Case
from oracle import Recipe, assert_same, train_plain
from torch import Tensor, nn

PRECISIONS = ["32-true", "bf16-mixed"]
PAGED = [
    Where("nvme", "nvme", tight=True),
    Where("nvme", "cpu"),
    Where("nvme", "nvme", aliased=False, tight=True),
    Where("cpu", "cpu", aliased=False, tight=True),
]
GPT = Case(ZOO["gpt"].build, ZOO["gpt"].batch, units=("Embedding",))
IN_PLACE = [
    Where("none", "none"),
    Where("none", "nvme"),
    Where("none", "none", aliased=False),
    Where("none", "cpu", aliased=False),
    Where("none", "nvme", aliased=False),
]
everywhere = pytest.mark.parametrize("where", [*PAGED, *IN_PLACE], ids=str)
paged = pytest.mark.parametrize("where", PAGED, ids=str)
both_precisions = pytest.mark.parametrize("precision", PRECISIONS)


def pairs(running: Session, plain: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    ours = dict(running.model.named_parameters())
    return [(name, ours[name], param) for name, param in plain.named_parameters()]


def assert_equal_to(running: Session, plain: nn.Module) -> None:
    for name, ours, theirs in pairs(running, plain):
        assert torch.equal(ours, theirs), name
    masters = running.result().masters
    for name, theirs in plain.named_parameters():
        assert torch.equal(masters[name], theirs), name


def gathers(running: Session) -> int:
    return running.engine.counters.gathers


@everywhere
@both_precisions
def test_metadata_needs_no_gather(where: Where, precision: str, tmp_path: Path) -> None:
    plain = GPT.make()
    with session(GPT, tmp_path, where, precision) as running:
        before = gathers(running)
        for name, ours, theirs in pairs(running, plain):
            for look in (
                lambda p: (p.shape, p.ndim, p.numel(), p.size(0), len(p), p.dim(), p.nelement()),
                lambda p: (
                    p.dtype,
                    p.device,
                    p.layout,
                    p.stride(),
                    p.stride(0),
                    p.element_size(),
                    p.itemsize,
                    p.nbytes,
                ),
                lambda p: (p.requires_grad, p.is_leaf, p.grad, p.grad_fn, p.is_contiguous(), p.get_device()),
                lambda p: (p.is_floating_point(), p.is_complex(), p.is_cuda, p.is_cpu, p.is_sparse, p.is_meta),
                lambda p: (torch.is_floating_point(p), torch.numel(p), torch.is_tensor(p), isinstance(p, nn.Parameter)),
            ):
                assert look(ours) == look(theirs), name
            assert isinstance(ours, nn.Parameter)
            repr(ours) if where.params == "none" else None
        assert sum(p.numel() for p in running.model.parameters()) == sum(p.numel() for p in plain.parameters())
        assert gathers(running) == before


@paged
def test_optimizers_need_no_gather(where: Where, tmp_path: Path) -> None:
    with session(GPT, tmp_path, where) as running:
        before = gathers(running)
        params = list(running.model.parameters())
        groups = [{"params": [p for p in params if p.ndim >= 2]}, {"params": [p for p in params if p.ndim < 2]}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=True)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        optimizer.zero_grad()
        optimizer.state_dict()
        running.model.train().eval().requires_grad_(True)
        assert gathers(running) == before


def init_like_hugging_face(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(0, 0.02)
        if module.bias is not None:
            module.bias.data.zero_()
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
        module.weight.data[3].zero_()
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.constant_(module.bias, 0.5)


@torch.no_grad()
def double(module: nn.Module) -> None:
    for param in module.parameters(recurse=False):
        param.mul_(2)


@torch.no_grad()
def copy_noise(module: nn.Module) -> None:
    for param in module.parameters(recurse=False):
        param.copy_(torch.randn(param.shape))
        param[0] = 1.0


def set_data(module: nn.Module) -> None:
    for param in module.parameters(recurse=False):
        param.data = torch.randn(param.shape)


def set_tiny(module: nn.Module) -> None:
    """Changes that bfloat16 alone could not tell."""
    for param in module.parameters(recurse=False):
        param.data += 1e-6 * torch.randn(param.shape)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "hugging-face": init_like_hugging_face,
    "in-place": double,
    "copy": copy_noise,
    "data-setter": set_data,
    "tiny": set_tiny,
}


@everywhere
@both_precisions
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_stay(change: Callable[[nn.Module], None], where: Where, precision: str, tmp_path: Path) -> None:
    plain = GPT.make()
    with session(GPT, tmp_path, where, precision) as running:
        for model in (plain, running.model):
            torch.manual_seed(7)
            model.apply(change)
        assert_equal_to(running, plain)
        trained = train_plain(Case(lambda: plain, GPT.batch), precision, Recipe())
        assert_same(running.train().result(), trained)


@everywhere
@both_precisions
def test_changes_between_steps_stay(where: Where, precision: str, tmp_path: Path) -> None:
    """Masters and moments are what they are; only the weight is replaced."""
    recipe = Recipe(steps=4)

    def halve(model: nn.Module) -> None:
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.5)

    expected = train_plain(
        GPT, precision, recipe, lambda plain: [halve(nn.ParameterList(plain.masters.values())), plain.publish()]
    )
    with session(GPT, tmp_path, where, precision, recipe) as running:
        for _ in range(recipe.steps):
            running.step()
            halve(running.model)
        assert_same(running.result(), expected)


@everywhere
@both_precisions
def test_deepcopy_makes_ordinary_parameters(where: Where, precision: str, tmp_path: Path) -> None:
    plain = GPT.make()
    with session(GPT, tmp_path, where, precision) as running:
        twin = copy.deepcopy(running.model)
        assert twin.head.weight is twin.embed.weight
        for (name, theirs), ours in zip(plain.named_parameters(), twin.parameters(), strict=True):
            assert type(ours) is nn.Parameter
            assert torch.equal(ours, theirs), name
        with torch.no_grad():
            for param in twin.parameters():
                param.zero_()
        assert_equal_to(running, plain)


@everywhere
@both_precisions
def test_averaged_model(where: Where, precision: str, tmp_path: Path) -> None:
    with session(GPT, tmp_path, where, precision) as running:
        average = torch.optim.swa_utils.AveragedModel(running.model)
        running.train(1)
        average.update_parameters(running.model)
        masters = running.result().masters
        for name, param in average.module.named_parameters():
            assert torch.equal(param, masters[name]), name


@everywhere
@both_precisions
def test_list_operators_over_many_units(where: Where, precision: str, tmp_path: Path) -> None:
    plain = GPT.make()
    with session(GPT, tmp_path, where, precision) as running:
        ours, theirs = list(running.model.parameters()), list(plain.parameters())
        for a, b in zip(torch._foreach_norm(ours), torch._foreach_norm(theirs), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            torch._foreach_mul_(ours, 3.0)
            torch._foreach_mul_(theirs, 3.0)
        assert torch.equal(nn.utils.parameters_to_vector(ours), nn.utils.parameters_to_vector(theirs))
        assert_equal_to(running, plain)


@everywhere
@both_precisions
def test_state_dict_and_back(where: Where, precision: str, tmp_path: Path) -> None:
    plain, other = GPT.make(), GPT.make(seed=1)
    with session(GPT, tmp_path, where, precision) as running:
        state = running.model.state_dict()
        assert state.keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            assert torch.equal(state[name], value), name
        del state
        running.model.load_state_dict(other.state_dict())
        assert_equal_to(running, other)
        running.train(1)
        assert torch.equal(running.model.head.weight, running.model.embed.weight)


@everywhere
@both_precisions
def test_pickle(where: Where, precision: str, tmp_path: Path) -> None:
    plain = GPT.make()
    with session(GPT, tmp_path, where, precision) as running:
        file = io.BytesIO()
        torch.save(dict(running.model.named_parameters()), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        for name, param in plain.named_parameters():
            assert type(loaded[name]) is nn.Parameter
            assert torch.equal(loaded[name], param), name


@everywhere
def test_identity_attributes_and_hooks(where: Where, tmp_path: Path) -> None:
    model = GPT.make()
    held = model.blocks[0].up.weight
    held.no_weight_decay = True
    ids = [id(p) for p in model.parameters()]
    members, numbers = set(model.parameters()), {p: i for i, p in enumerate(model.parameters())}
    with session(GPT, tmp_path, where, model=model) as running:
        calls: list[str] = []
        model.blocks[1].up.weight.register_hook(lambda grad: calls.append("grad"))
        model.blocks[1].up.weight.register_post_accumulate_grad_hook(lambda p: calls.append("post"))
        running.train(1)
        assert calls == ["grad", "post"] * 2
        assert [id(p) for p in model.parameters()] == ids
        assert model.blocks[0].up.weight is held
        assert held.no_weight_decay
        assert all(p in members and numbers[p] == i for i, p in enumerate(model.parameters()))
        with running.engine.frame("train"):
            assert all(p in members and numbers[p] == i for i, p in enumerate(model.parameters()))


@paged
@both_precisions
def test_a_parameter_of_a_released_one(where: Where, precision: str, tmp_path: Path) -> None:
    plain = GPT.make()
    with session(GPT, tmp_path, where, precision) as running:
        made = nn.Parameter(running.model.blocks[0].up.weight)
        assert type(made) is nn.Parameter
        assert torch.equal(made, plain.blocks[0].up.weight)


@paged
@both_precisions
def test_an_alias_stays_readable(where: Where, precision: str, tmp_path: Path) -> None:
    plain = GPT.make()
    with session(GPT, tmp_path, where, precision) as running:
        alias = running.model.blocks[0].up.weight.data
        view = running.model.blocks[1].down.weight.detach().t()
        for param in running.model.parameters():
            param.sum()
        assert torch.equal(alias, plain.blocks[0].up.weight)
        assert torch.equal(view, plain.blocks[1].down.weight.t())
        running.train(2)
        assert torch.isfinite(alias).all()
        assert torch.isfinite(view).all()


@paged
@both_precisions
def test_code_around_torch_functions_reads_nan(where: Where, precision: str, tmp_path: Path) -> None:
    with session(GPT, tmp_path, where, precision) as running:
        running.train(1)
        running.engine.flush()
        with torch._C.DisableTorchFunctionSubclass():
            for param in running.model.parameters():
                assert torch.isnan(param).all()


@everywhere
@both_precisions
def test_to_another_dtype_keeps_the_masters(where: Where, precision: str, tmp_path: Path) -> None:
    """Units keep their dtype; values go through the other one."""
    plain = GPT.make().double().float()
    with session(GPT, tmp_path, where, precision) as running:
        running.model.to(torch.float64)
        running.engine.flush()
        assert {p.dtype for p in running.model.parameters()} == {torch.float32}
        assert_equal_to(running, plain)
        running.train(1)


@paged
@both_precisions
def test_at_most_a_few_units_stay_in_memory(where: Where, precision: str, tmp_path: Path) -> None:
    with session(GPT, tmp_path, where, precision) as running:
        for param in running.model.parameters():
            param.sum()
        held = [u for u in running.engine.units if u.state.name != "RELEASED"]
        assert 1 <= len(held) <= 2
        running.engine.release_host()
        assert not [u for u in running.engine.units if u.state.name != "RELEASED"]


@paged
@both_precisions
def test_norm_of_all_weights(where: Where, precision: str, tmp_path: Path) -> None:
    plain = GPT.make()

    def norm(model: nn.Module) -> Tensor:
        return torch.stack([p.float().norm() ** 2 for p in model.parameters()]).sum().sqrt()

    with session(GPT, tmp_path, where, precision) as running:
        assert torch.equal(norm(running.model), norm(plain))
        assert running.engine.counters.overcommits == 0


@paged
@both_precisions
def test_backward_outside_of_a_step_is_right_or_refused(where: Where, precision: str, tmp_path: Path) -> None:
    """Never NaN: autograd may have saved parameters that have been released since."""
    plain = GPT.make()
    with session(GPT, tmp_path, where, precision) as running:
        sum(p.square().sum() for p in plain.parameters()).backward()
        loss = sum(p.square().sum() for p in running.model.parameters())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        running.optimizer.zero_grad()
        last = list(running.model.parameters())[-1]
        last.square().sum().backward()
        if where.aliased is None:
            assert torch.equal(last.grad, list(plain.parameters())[-1].grad)


@paged
@both_precisions
def test_a_wrong_shape_is_refused_by_name(where: Where, precision: str, tmp_path: Path) -> None:
    with session(GPT, tmp_path, where, precision) as running:
        weight = running.model.blocks[0].up.weight
        weight.data = torch.zeros(3)
        with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight.*shape \(3,\)"):
            running.engine.flush()
