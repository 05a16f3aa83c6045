"""Adam against torch.optim, against a float64 formula with an error bound, and against the torch reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_states import HYPER, State, any_bits, needs_extension, same_bits, spread

from lightning_zinf.ops import reference
from lightning_zinf.ops.kernels import AdamHyper, Segment, adam_update

# torch's CPU kernels round as documented in ops/kernels/isa_impl.inc only where they are built with fma.
needs_torch_fma = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch's kernels have no fma here"
)


def exact_sqrt(tensor: torch.Tensor, *, sqrt=torch.Tensor.sqrt) -> torch.Tensor:
    return sqrt(tensor.double()).float() if tensor.dtype == torch.float32 else sqrt(tensor)


TORCH_CASES = {
    "adamw": {"decoupled": True},
    "adamw-maximize": {"decoupled": True, "weight_decay": 0.1, "lr": 3e-3, "maximize": True},
    "adamw-no-decay": {"decoupled": True, "weight_decay": 0.0, "betas": (0.95, 0.5)},
    "adamw-far-lerp": {"decoupled": True, "betas": (0.4, 0.99), "eps": 1e-5},
    "adamw-beta-zero": {"decoupled": True, "betas": (0.0, 0.0)},
    "adamw-beta-half": {"decoupled": True, "betas": (0.5, 0.999)},
    "adam": {"decoupled": False},
    "adam-l2": {"decoupled": False, "weight_decay": 0.1, "lr": 3e-3},
    "adam-l2-maximize": {"decoupled": False, "weight_decay": 1e-4, "maximize": True},
}


def torch_optimizer(parameter: torch.Tensor, options: dict) -> tuple[torch.optim.Optimizer, AdamHyper]:
    options = dict(options)
    decoupled = options.pop("decoupled")
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = cls([parameter], foreach=False, fused=False, **options)
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    hyper = AdamHyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], 1, decoupled, group["maximize"])
    return optimizer, hyper


@needs_torch_fma
@pytest.mark.parametrize("options", TORCH_CASES.values(), ids=TORCH_CASES.keys())
@pytest.mark.parametrize("numel", [1, 1031])
def test_equals_torch_to_the_bit_for_1000_steps(options: dict, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # With a correctly rounded square root; that of torch's x86 builds is not (see the next test).
    monkeypatch.setattr(torch.Tensor, "sqrt", exact_sqrt)
    generator = torch.Generator().manual_seed(numel)
    parameter = torch.nn.Parameter(spread(generator, numel, 2))
    optimizer, hyper = torch_optimizer(parameter, options)
    ours = State(parameter.detach().clone(), None, torch.zeros(numel), torch.zeros(numel))
    for step in range(1, 1001):
        parameter.grad = spread(generator, numel, 8 if step % 2 else 1)
        parameter.grad[torch.rand(numel, generator=generator) < 0.01] = 0
        optimizer.step()
        adam_update(*ours.planes(), [Segment(0, parameter.grad, 0)], [replace(hyper, step=step)])
        state = optimizer.state[parameter]
        if step < 10 or step % 50 == 0:
            assert ours == State(parameter.detach(), None, state["exp_avg"], state["exp_avg_sq"]), step


@needs_torch_fma
@pytest.mark.parametrize("decoupled", [True, False])
def test_is_near_torch_as_it_is(decoupled: bool) -> None:
    """From the same state, the moments are equal and the weight is as near as the square root allows.

    torch's float32 square root on a CPU is within one unit in the last place: 2^-23 relative. Dividing and adding eps
    may round apart by 2^-23 each, dividing by the denominator too: 2^-21 of the update, and the last addition rounds.
    """
    generator = torch.Generator().manual_seed(0)
    numel = 100_003
    parameter = torch.nn.Parameter(spread(generator, numel, 2))
    optimizer, hyper = torch_optimizer(parameter, {"decoupled": decoupled, "weight_decay": 0.01})
    for step in range(1, 21):
        before = parameter.detach().clone()
        state = optimizer.state[parameter]
        moments = [state[name].clone() if state else torch.zeros(numel) for name in ("exp_avg", "exp_avg_sq")]
        ours = State(before.clone(), None, *moments)
        parameter.grad = spread(generator, numel)
        optimizer.step()
        adam_update(*ours.planes(), [Segment(0, parameter.grad, 0)], [replace(hyper, step=step)])
        state = optimizer.state[parameter]
        assert same_bits(ours.exp_avg, state["exp_avg"])
        assert same_bits(ours.exp_avg_sq, state["exp_avg_sq"])
        after = parameter.detach()
        decay = 1 - hyper.lr * hyper.weight_decay if decoupled else 1
        update = (after.double() - before.double() * decay).abs() + 2**-23 * before.double().abs()
        bound = 2**-21 * update + 2**-23 * after.double().abs() + 2**-148
        assert ((ours.weight.double() - after.double()).abs() <= bound).all()


@needs_torch_fma
def test_non_finite_gradients_do_what_they_do_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "sqrt", exact_sqrt)
    inf, nan = float("inf"), float("nan")
    grad = torch.tensor([inf, -inf, nan, 3e38, -3e38, 1e-45, 0.0, -0.0] * 5)
    for clip_value in (None, 1.0):
        parameter = torch.nn.Parameter(torch.ones_like(grad))
        optimizer, hyper = torch_optimizer(parameter, {"decoupled": True})
        ours = State(torch.ones_like(grad), None, torch.zeros_like(grad), torch.zeros_like(grad))
        for step in (1, 2, 3):
            parameter.grad = grad if clip_value is None else grad.clamp(-clip_value, clip_value)
            optimizer.step()
            adam_update(*ours.planes(), [Segment(0, grad, 0)], [replace(hyper, step=step)], clip_value=clip_value)
        state = optimizer.state[parameter]
        theirs = State(parameter.detach(), None, state["exp_avg"], state["exp_avg_sq"])
        for a, b in zip(ours.planes(), theirs.planes(), strict=True):
            assert (a is None and b is None) or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            assert a is None or torch.equal(a.isnan(), b.isnan())
        assert same_bits(ours.weight[2:3], torch.tensor([nan]))


@pytest.mark.parametrize("decoupled", [True, False])
def test_error_against_float64_is_bounded(decoupled: bool) -> None:
    """On any machine: each line of the formula adds its roundings, u = 2^-24 relative each."""
    generator = torch.Generator().manual_seed(1)
    numel, u = 50_001, 2.0**-24
    hyper = replace(HYPER, decoupled=decoupled, weight_decay=0.1 if decoupled else 0.0)
    state = State.random(generator, numel, split=False)
    grad = spread(generator, numel, 2)
    _, _, decay, _, w, beta2, one_minus_beta2, bias2_sqrt, eps, neg_step = reference.adam_scalars(hyper, 1.0, None)
    p, m, v, g = (t.double() for t in (state.weight, state.exp_avg, state.exp_avg_sq, grad))
    m_new = m + w * (g - m)
    v_new = v * beta2 + one_minus_beta2 * g * g
    denom = v_new.sqrt() / bias2_sqrt + eps
    p_new = p * decay + neg_step * m_new / denom
    adam_update(*state.planes(), [Segment(0, grad, 0)], [hyper])

    slack, tiny = 1.001, 2.0**-140  # second-order terms; underflow
    m_bound = slack * u * (w * (g - m).abs() + m_new.abs()) + tiny
    assert ((state.exp_avg.double() - m_new).abs() <= m_bound).all()
    # Two roundings of each summand at most, then of the sum; the denominator's error is half of it and three more.
    v_bound = slack * 2 * u * v_new + tiny
    assert ((state.exp_avg_sq.double() - v_new).abs() <= v_bound).all()
    update = (neg_step * m_new / denom).abs()
    p_bound = (u * ((p * decay).abs() + p_new.abs() + 6 * update) + abs(neg_step) * m_bound / denom) * slack + tiny
    assert ((state.weight.double() - p_new).abs() <= p_bound).all()


hypers = st.builds(
    AdamHyper,
    lr=st.floats(0, 1),
    beta1=st.floats(0, 0.9999),
    beta2=st.floats(0, 0.99999),
    eps=st.floats(0, 1e-3),
    weight_decay=st.sampled_from([0.0, 0.01, 0.3]),
    step=st.integers(1, 10**6),
    decoupled=st.booleans(),
    maximize=st.booleans(),
)


@needs_extension
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    split=st.booleans(),
    pieces=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 300), st.booleans(), st.integers(0, 1), st.booleans()), max_size=6
    ),
    rows=st.tuples(hypers, hypers),
    grad_scale=st.sampled_from([1.0, 1 / 65536, 0.3, -2.5]),
    clip_value=st.sampled_from([None, 1.0, 1e-3]),
    shuffle=st.randoms(use_true_random=False),
)
def test_equals_the_reference_to_the_bit(seed, split, pieces, rows, grad_scale, clip_value, shuffle) -> None:
    generator = torch.Generator().manual_seed(seed)
    segments, end = [], 0
    for gap, numel, bf16, row, weird in pieces:
        grad = any_bits(generator, numel) if weird else spread(generator, numel)
        segments.append(Segment(end + gap, grad.bfloat16() if bf16 else grad, row))
        end += gap + numel
    shuffle.shuffle(segments)
    state = State.random(generator, end + 5, split)
    oracle, before = state.clone(), state.clone()
    adam_update(*state.planes(), segments, rows, grad_scale=grad_scale, clip_value=clip_value)
    reference.adam_update(*oracle.planes(), segments, rows, grad_scale=grad_scale, clip_value=clip_value)
    assert state == oracle
    outside = torch.ones(end + 5, dtype=torch.bool)
    for segment in segments:
        outside[segment.offset : segment.offset + segment.grad.numel()] = False
    for a, b in zip(state.planes(), before.planes(), strict=True):
        assert a is None or same_bits(a[outside], b[outside])


@needs_extension
def test_split_planes_hold_the_same_master_as_a_float32_plane() -> None:
    generator = torch.Generator().manual_seed(3)
    numel = 10_007
    split = State.random(generator, numel, split=True)
    plain = State(split.master().clone(), None, split.exp_avg.clone(), split.exp_avg_sq.clone())
    for step in range(1, 30):
        grad = spread(generator, numel)
        for state in (split, plain):
            adam_update(*state.planes(), [Segment(0, grad, 0)], [replace(HYPER, step=step)])
    assert same_bits(split.master(), plain.weight)
    assert ((split.weight.float() - plain.weight).abs() <= 2.0**-8 * plain.weight.abs()).all()
