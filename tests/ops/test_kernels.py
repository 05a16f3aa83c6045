"""The compute kernels on every setting and with bad arguments; sums of squares; split master. Adam: test_adam.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from kernel_states import HYPER, ISAS, State, any_bits, bits, needs_extension, same_bits, spread

from lightning_zinf.ops import copy_all, kernels, reference
from lightning_zinf.ops.kernels import Segment, adam_update


@pytest.fixture(autouse=True)
def _default_settings() -> Iterator[None]:
    threads = kernels.num_threads()
    yield
    if kernels.AVAILABLE:
        kernels.set_num_threads(threads)
        kernels._ext.set_isa(os.environ.get("ZINF_ISA") or ISAS[-1])


@needs_extension
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_same_bits_on_every_isa_and_thread_count(split: bool, bf16: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    numel = 200_003
    start = State.random(generator, numel, split)
    grad = torch.where(
        torch.rand(numel, generator=generator) < 0.1, any_bits(generator, numel), spread(generator, numel)
    )
    grad = grad.bfloat16() if bf16 else grad
    rows = [HYPER, replace(HYPER, beta1=0.3, decoupled=False)]
    segments = [Segment(1, grad[1:70_000], 0), Segment(70_003, grad[70_003:], 1)]
    expected = start.clone()
    reference.adam_update(*expected.planes(), segments, rows, grad_scale=0.1)
    norms = None
    for isa in ISAS:
        kernels._ext.set_isa(isa)
        assert kernels.isa() == isa
        for threads in (1, 2, 3, 7):
            kernels.set_num_threads(threads)
            assert kernels.num_threads() == threads
            state = start.clone()
            adam_update(*state.planes(), segments, rows, grad_scale=0.1)
            assert state == expected, (isa, threads)
            found = kernels.squared_norms([start.exp_avg, start.exp_avg[:77], start.exp_avg[3:]])
            norms = norms or found
            assert found == norms, (isa, threads)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
def test_zinf_isa_chooses_the_instruction_set(isa: str) -> None:
    script = "from lightning_zinf.ops import kernels; print(kernels.isa())"
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "ZINF_ISA": isa}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == isa


@needs_extension
def test_unknown_zinf_isa_is_an_error_that_lists_the_choices() -> None:
    script = "from lightning_zinf.ops import kernels; print(kernels.isa())"
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "ZINF_ISA": "sse9"}, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "ZINF_ISA='sse9'" in run.stderr
    assert "base" in run.stderr


@needs_extension
def test_concurrent_callers_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(4)
    kernels.set_num_threads(3)
    states = [State.random(generator, 150_001, split=i % 2 == 0) for i in range(6)]
    grads = [spread(generator, 150_001) for _ in states]
    expected = [state.clone() for state in states]

    def update(state: State, grad: torch.Tensor) -> None:
        for step in range(1, 6):
            adam_update(*state.planes(), [Segment(0, grad, 0)], [replace(HYPER, step=step)])

    for state, grad in zip(expected, grads, strict=True):
        update(state, grad)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(update, states, grads))
    assert states == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_norm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = [spread(generator, n).to(dtype) for n in (0, 1, 31, 33, 1000, 65_536, 65_537, 300_000)]
    total, finite = kernels.squared_norm([tensor.view(-1, 1) for tensor in tensors])
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors)
    assert finite
    assert total == pytest.approx(exact, rel=1e-12)
    assert total == sum(kernels.squared_norms(tensors))
    assert kernels.squared_norm([]) == (0.0, True)


def test_squared_norm_of_huge_values_does_not_overflow() -> None:
    total, finite = kernels.squared_norm([torch.full((1000,), torch.finfo(torch.float32).max)])
    assert finite
    assert total == pytest.approx(1000 * torch.finfo(torch.float32).max ** 2)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 70_000, 99_999])
def test_squared_norm_reports_non_finite_values(bad: float, at: int) -> None:
    tensor = torch.ones(100_000)
    tensor[at] = bad
    total, finite = kernels.squared_norm([torch.ones(5), tensor.bfloat16(), torch.ones(5)])
    assert not finite
    assert not -float("inf") < total < float("inf")


@pytest.mark.parametrize("numel", [0, 1, 17, 300_001])
def test_split_and_join_master(numel: int) -> None:
    master = any_bits(torch.Generator().manual_seed(numel), numel)
    halves = [(torch.empty(numel, dtype=torch.bfloat16), torch.empty(numel, dtype=torch.int16)) for _ in range(2)]
    kernels.split_master(master, *halves[0])
    reference.split_master(master, *halves[1])
    assert same_bits(halves[0][0], halves[1][0])
    assert same_bits(halves[0][1], halves[1][1])
    for module in (kernels, reference):
        joined = torch.empty(numel)
        module.join_master(*halves[0], joined)
        assert same_bits(joined, master)


def test_split_weight_is_the_nearest_bfloat16() -> None:
    master = spread(torch.Generator().manual_seed(6), 10_000, 10)
    weight, residual = torch.empty(10_000, dtype=torch.bfloat16), torch.empty(10_000, dtype=torch.int16)
    kernels.split_master(master, weight, residual)
    ties = bits(master) & 0xFFFF == 0x8000  # the only place where rounding half to even may differ
    assert same_bits(weight[~ties], master.bfloat16()[~ties])


def good_call() -> dict:
    return {
        "weight": torch.ones(10),
        "residual": None,
        "exp_avg": torch.zeros(10),
        "exp_avg_sq": torch.zeros(10),
        "segments": [Segment(0, torch.ones(10), 0)],
        "hypers": [HYPER],
    }


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.ones(10).bfloat16()}, TypeError, "weight must have dtype torch.float32"),
        ({"weight": torch.ones(10, device="meta")}, ValueError, "weight must be a dense tensor in host memory"),
        ({"weight": torch.ones(20)[::2]}, ValueError, "weight must be contiguous"),
        ({"weight": torch.ones(11)}, ValueError, "exp_avg has 10 elements, expected 11"),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"residual": torch.zeros(10, dtype=torch.int16)}, TypeError, "weight must have dtype torch.bfloat16"),
        ({"exp_avg": torch.zeros(10).double()}, TypeError, "exp_avg must have dtype torch.float32"),
        ({"exp_avg_sq": torch.zeros(9)}, ValueError, "exp_avg_sq has 9 elements, expected 10"),
        ({"segments": [Segment(1, torch.ones(10), 0)]}, ValueError, "outside the planes"),
        ({"segments": [Segment(-1, torch.ones(5), 0)]}, ValueError, "outside the planes"),
        ({"segments": [Segment(0, torch.ones(6), 0), Segment(5, torch.ones(5), 0)]}, ValueError, "overlaps"),
        ({"segments": [Segment(0, torch.ones(10).half(), 0)]}, TypeError, r"segments\[0\].grad must have dtype"),
        ({"segments": [Segment(0, torch.ones(5, 4).T[:2], 0)]}, ValueError, r"segments\[0\].grad must be contig"),
        ({"segments": [Segment(0, torch.ones(10).to_sparse(), 0)]}, ValueError, r"segments\[0\].grad must be a dense"),
        ({"segments": [Segment(0, torch.ones(10), 1)]}, ValueError, "row 1 of 1 hyper-parameter rows"),
        ({"hypers": [replace(HYPER, step=0)]}, ValueError, "step counts from 1"),
        ({"clip_value": 0.0}, ValueError, "clip_value must be positive"),
        ({"clip_value": float("nan")}, ValueError, "clip_value must be positive"),
    ],
)
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_extension), False])
def test_bad_arguments_are_named(change, error, match, compiled, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "_ext", None)
        monkeypatch.setattr(kernels, "_warn_fallback", lambda: None)
    call = {**good_call(), **change}
    with pytest.raises(error, match=match):
        adam_update(**call)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        tensor = call[name]
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            assert (tensor == (1 if name == "weight" else 0)).all()


def test_bad_arguments_of_the_other_kernels() -> None:
    half, residual, master = torch.ones(4).bfloat16(), torch.zeros(4, dtype=torch.int16), torch.ones(4)
    with pytest.raises(TypeError, match=r"tensors\[1\] must have dtype torch.float32 or torch.bfloat16"):
        kernels.squared_norm([master, master.double()])
    with pytest.raises(ValueError, match=r"tensors\[0\] must be contiguous"):
        kernels.squared_norm([torch.ones(4, 4).T])
    with pytest.raises(TypeError, match=r"weight must have dtype torch\.bfloat16"):
        kernels.split_master(master, master, residual)
    with pytest.raises(ValueError, match="residual has 4 elements, expected 5"):
        kernels.split_master(torch.ones(5), torch.ones(5).bfloat16(), residual)
    with pytest.raises(TypeError, match=r"master must have dtype torch\.float32"):
        kernels.join_master(half, residual, half)
    with pytest.raises(ValueError, match="at least 1"):
        kernels.set_num_threads(0)


def test_without_the_extension_it_warns_once_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(7)
    start = State.random(generator, 1000, split=True)
    grad = spread(generator, 1000)
    expected, found = start.clone(), start.clone()
    adam_update(*expected.planes(), [Segment(0, grad, 0)], [HYPER])
    monkeypatch.setattr(kernels, "_ext", None)
    kernels._warn_fallback.cache_clear()
    with pytest.warns(UserWarning, match="WITHOUT its compiled extension") as caught:
        adam_update(*found.planes(), [Segment(0, grad, 0)], [HYPER])
    kernels.squared_norm([grad])  # an error if it warned again
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert kernels.isa() == "reference"
    if ISAS:
        assert found == expected


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_extension), False])
def test_copies(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "_ext", None)
    generator = torch.Generator().manual_seed(8)
    sources = [any_bits(generator, n) for n in (0, 1, 3, 17, 1000, 70_001, 1_000_003)]
    sources += [source.bfloat16() for source in sources]
    room = [torch.full((source.numel() + 3,), 7, dtype=source.dtype) for source in sources]
    copy_all([(to[1:-2], source) for to, source in zip(room, sources, strict=True)])
    for to, source in zip(room, sources, strict=True):
        assert same_bits(to[1:-2], source)
        assert (to[[0, -2, -1]] == 7).all()
    copy_all([])


def test_copies_refuse_what_does_not_match() -> None:
    with pytest.raises(ValueError, match=r"pairs\[0\]\[0\] has 4 elements, expected 3"):
        copy_all([(torch.ones(4), torch.ones(3))])
    with pytest.raises(TypeError, match=r"pairs\[1\]\[0\] must have dtype torch\.bfloat16"):
        copy_all([(torch.ones(3), torch.ones(3)), (torch.ones(4), torch.ones(4).bfloat16())])
    with pytest.raises(ValueError, match=r"pairs\[0\]\[1\] must be contiguous"):
        copy_all([(torch.ones(4, 4), torch.ones(4, 4).T)])
