"""The precision plugin and clipping (contract 1.6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning_cases import PLACES, Net, assert_close, assert_same, loader, net, trainer, weights
from torch import Tensor

from lightning_zinf import _compat
from lightning_zinf.lightning import ZinfPrecision

EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


def fit(root: Path, strategy: str, kind: type[Net] = Net, **options: Any) -> dict[str, Tensor]:
    module = net(kind)
    trainer(root, strategy, **options).fit(module, loader(), loader(2))
    return weights(module)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "32-true"),
        (32, "32-true"),
        ("bf16-mixed", "bf16-mixed"),
        ("16-mixed", "bf16-mixed"),
        ("bf16-true", "bf16-true"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
def test_supported(tmp_path: Path, given: Any, expected: str) -> None:
    used = trainer(tmp_path, "zinf", precision=given)
    assert type(used.precision_plugin) is ZinfPrecision
    assert used.precision == expected
    assert used.scaler is None


@pytest.mark.parametrize("given", ["16-true", "64-true"])
def test_unsupported_is_refused_at_once(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ValueError, match=f"'32-true', 'bf16-mixed', 'bf16-true', '16-mixed', got '{given}'"):
        trainer(tmp_path, "zinf", precision=given)


def test_explicit_plugins(tmp_path: Path) -> None:
    used = trainer(tmp_path, "zinf", plugins=[MixedPrecision("bf16-mixed", "cpu")])
    assert used.precision == "bf16-mixed"
    assert type(used.precision_plugin) is ZinfPrecision
    assert trainer(tmp_path, "zinf", plugins=[Precision()]).precision == "32-true"
    assert trainer(tmp_path, "zinf", plugins=[HalfPrecision("bf16-true")]).precision == "bf16-true"
    scaler = torch.amp.GradScaler("cpu")
    used = trainer(tmp_path, "zinf", plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert used.precision == "16-mixed"
    assert used.scaler is scaler
    with pytest.raises(ValueError, match="supports Trainer"):
        trainer(tmp_path, "zinf", plugins=[DoublePrecision()])

    class Mine(Precision):
        pass

    with pytest.raises(ValueError, match=r"has a precision plugin of its own and cannot use .*Mine"):
        trainer(tmp_path, "zinf", plugins=[Mine()])


class Watched(Net):
    """Checks what compute and the user see in mixed precision."""

    def forward(self, x: Tensor) -> Tensor:
        if self.trainer.training or self.trainer.validating:
            assert torch.is_autocast_enabled("cpu")
        return super().forward(x)

    def on_train_batch_end(self, *args: Any) -> None:
        assert all(p.dtype == torch.float32 for p in self.parameters())


def test_mixed_precision_learns_and_every_place_gives_the_same_bits(tmp_path: Path) -> None:
    results = [fit(tmp_path, place, Watched, precision="bf16-mixed", max_epochs=2) for place in PLACES]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert all(v.dtype == torch.float32 for v in results[0].values())
    full = fit(tmp_path, "auto", max_epochs=2)
    start = dict(net().state_dict())
    for name, value in full.items():
        moved = (value - start[name]).norm()
        assert (results[0][name] - value).norm() <= 0.2 * moved, name


@EVERY_PLACE
def test_mixed_precision_resumes_bit_for_bit(tmp_path: Path, place: str) -> None:
    module = net()
    used = trainer(tmp_path, place, precision="bf16-mixed")
    used.fit(module, loader())
    used.save_checkpoint(tmp_path / "a.ckpt")
    resumed = net()
    trainer(tmp_path, "nvme", precision="bf16-mixed", max_epochs=2).fit(
        resumed, loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert_same(weights(resumed), fit(tmp_path, "device", precision="bf16-mixed", max_epochs=2))
    exact = net()
    trainer(tmp_path, "device", max_epochs=2).fit(exact, loader(), ckpt_path=tmp_path / "a.ckpt")


@EVERY_PLACE
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(tmp_path: Path, place: str, algorithm: Any) -> None:
    settings = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm, "max_epochs": 2}
    ours, theirs = fit(tmp_path, place, **settings), fit(tmp_path, "auto", **settings)
    assert_close(ours, theirs)
    free = fit(tmp_path, "auto", max_epochs=2)
    assert any((free[name] - ours[name]).abs().max() > 1e-3 for name in ours)


@EVERY_PLACE
def test_own_configure_gradient_clipping(tmp_path: Path, place: str) -> None:
    class Own(Net):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            assert gradient_clip_val is None
            clip = 0.05 if self.global_step % 2 else 0.5
            self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm="norm")

    assert_close(
        fit(tmp_path, place, Own, max_epochs=2),
        fit(tmp_path, "auto", Own, max_epochs=2),
    )


@EVERY_PLACE
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_grad_norm(tmp_path: Path, place: str, precision: Any) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if isinstance(trainer.precision_plugin, ZinfPrecision):
                norm = trainer.strategy.grad_norm()
                assert norm == trainer.strategy.grad_norm(optimizer)
            else:
                norm = float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]))
            self.norms.append(norm)

    norms = []
    for strategy in (place, "auto"):
        watch = Watch()
        fit(tmp_path, strategy, callbacks=[watch], precision=precision, max_steps=3, gradient_clip_val=0.1)
        norms.append(watch.norms)
    assert len(norms[0]) == 3
    assert norms[0] == pytest.approx(norms[1], rel=1e-5 if precision == "32-true" else 0.05)


# ---------------------------------------------------------------------- 16-mixed


class Spiky(Net):
    """Its loss is too large for float16 in one batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        self.log("scale", self.trainer.scaler.get_scale() if self.trainer.scaler else 0.0)
        return loss * 1e30 if self.global_step == 2 and batch_idx == 2 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def half(root: Path, strategy: str, **options: Any) -> tuple[dict[str, Tensor], pl.Trainer]:
    module = net(Spiky)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    used = trainer(root, strategy, plugins=[plugin], max_epochs=2, gradient_clip_val=0.5, **options)
    used.fit(module, loader(6))
    return weights(module), used


@EVERY_PLACE
def test_loss_scaling_is_that_of_amp(tmp_path: Path, place: str) -> None:
    """The scale goes through the same values as with plain Lightning, and the step with infinities is left out.

    Lightning keeps float32 weights that autocast rounds to float16; here compute has float16 weights, so gradients that
    it rounds come out a little different: 2^-10 relative at each of 12 steps.
    """
    ours, used = half(tmp_path, place)
    theirs, plain = half(tmp_path, "auto")
    assert used.scaler.state_dict() == plain.scaler.state_dict()
    assert used.scaler.get_scale() != 1024.0
    start = dict(net(Spiky).state_dict())
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 12 * 2**-10 * (value - start[name]).norm(), name


def test_float16_gives_the_same_bits_everywhere_and_resumes(tmp_path: Path) -> None:
    results = [half(tmp_path, place)[0] for place in PLACES]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    module = net(Spiky)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2))
    used = trainer(tmp_path, "nvme", plugins=[plugin], max_epochs=1, gradient_clip_val=0.5)
    used.fit(module, loader(6))
    used.save_checkpoint(tmp_path / "half.ckpt")
    resumed = net(Spiky)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2))
    again = trainer(tmp_path, "nvme", plugins=[plugin], max_epochs=2, gradient_clip_val=0.5)
    again.fit(resumed, loader(6), ckpt_path=tmp_path / "half.ckpt")
    assert_same(weights(resumed), results[0])


# ---------------------------------------------------------------------- bf16-true


class AllBfloat16(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.trainer.training:
            assert x.dtype == torch.bfloat16
            assert torch.empty(0).dtype == torch.bfloat16
        return super().forward(x)


@EVERY_PLACE
def test_bf16_true(tmp_path: Path, place: str) -> None:
    """The updates act on float32 masters, so it learns what training in bfloat16 alone rounds away."""
    ours = fit(tmp_path, place, AllBfloat16, precision="bf16-true", max_epochs=2)
    assert all(v.dtype == torch.bfloat16 for v in ours.values())
    full = fit(tmp_path, "auto", max_epochs=2)
    start = dict(net().state_dict())
    for name, value in full.items():
        moved = (value - start[name]).norm()
        assert (ours[name].float() - value).norm() <= 0.2 * moved, name


def test_module_knows_its_device_and_dtype() -> None:
    """What a step makes with ``device=self.device`` is where compute is, though parameters are moved by the engine."""
    outer, inner = pl.LightningModule(), pl.LightningModule()
    outer.inner, outer.linear = inner, torch.nn.Linear(2, 2)  # type: ignore[assignment]
    _compat.move_all_but_parameters(outer, torch.device("meta"))
    assert outer.device == inner.device == torch.device("meta")
    assert outer.linear.weight.device.type == "cpu"
    _compat.convert_all_but_managed(outer, torch.bfloat16)
    assert outer.dtype is inner.dtype is torch.bfloat16


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_accelerator_without_memory_is_told_with_numbers(tmp_path: Path, where: str) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    class Large(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            if where == "forward":
                fails()
            loss.register_hook(fails)
            return loss

    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)Tried to allocate 1.00 GiB.*take up to .* B.*device_bytes"):
        fit(tmp_path, "zinf", Large)
