"""Single-file checkpoints (contract 1.8): resume anywhere, load anywhere, at any time."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning_cases import PLACES, Net, assert_close, assert_same, loader, net, trainer, weights
from torch import Tensor, nn

EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


def fit(root: Path, strategy: str, epochs: int, path: Path | None = None, kind: type[Net] = Net, **options: Any) -> Any:
    module = net(kind)
    used = trainer(root, strategy, max_epochs=epochs, **options)
    used.fit(module, loader(), loader(2, seed=1), ckpt_path=path)
    return module, used


def optimizer_tensors(used: Any) -> dict[str, Tensor]:
    state = used.optimizers[0].state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each place and of the plain Trainer, after 2 of 4 epochs."""
    paths = {}
    for place in (*PLACES, "auto"):
        root = tmp_path_factory.mktemp(place)
        _, used = fit(root, place, 2)
        paths[place] = root / "half.ckpt"
        used.save_checkpoint(paths[place])  # after teardown
    return paths


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """4 epochs without interruption."""
    return fit(tmp_path_factory.mktemp("whole"), "device", 4)


@pytest.mark.parametrize(("saved", "resumed"), [("device", "nvme"), ("nvme", "device"), ("host", "nvme")])
def test_resume_gives_the_bits_of_an_uninterrupted_run(
    tmp_path: Path, half: dict[str, Path], whole: Any, saved: str, resumed: str
) -> None:
    module, used = fit(tmp_path, resumed, 4, half[saved])
    assert used.global_step == 24
    assert_same(weights(module), weights(whole[0]))
    assert_same(optimizer_tensors(used), optimizer_tensors(whole[1]))


def test_resume_from_and_in_the_plain_trainer(tmp_path: Path, half: dict[str, Path], whole: Any) -> None:
    module, used = fit(tmp_path, "nvme", 4, half["auto"])
    assert used.global_step == 24
    assert_close(weights(module), weights(whole[0]))
    module, used = fit(tmp_path, "auto", 4, half["nvme"])
    assert used.global_step == 24
    assert_close(module.state_dict(), weights(whole[0]))


@EVERY_PLACE
def test_file_is_what_the_plain_trainer_writes(half: dict[str, Path], place: str) -> None:
    ours, theirs = (torch.load(half[p], weights_only=True) for p in (place, "auto"))
    assert ours.keys() == theirs.keys()
    assert_close(ours["state_dict"], theirs["state_dict"])
    ours, theirs = ours["optimizer_states"][0], theirs["optimizer_states"][0]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entry in theirs["state"].items():
        assert ours["state"][index].keys() == entry.keys()
        for name, value in entry.items():
            assert ours["state"][index][name].shape == value.shape
            torch.testing.assert_close(ours["state"][index][name], value, atol=1e-4, rtol=1e-3)
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]


@EVERY_PLACE
def test_load_from_checkpoint(half: dict[str, Path], place: str) -> None:
    module = Net.load_from_checkpoint(half[place])
    assert module.hparams.lr == 1e-2
    assert_same(dict(module.state_dict()), torch.load(half[place])["state_dict"])


@EVERY_PLACE
def test_load_into_a_stepped_engine_again_and_again(tmp_path: Path, half: dict[str, Path], place: str) -> None:
    module, used = fit(tmp_path, place, 1)
    saved = torch.load(half["auto"])
    for _ in range(2):
        used.strategy.load_model_state_dict(saved)
        used.strategy.load_optimizer_state_dict(saved)
        assert_same(weights(module), saved["state_dict"])
    assert used.optimizers[0].state_dict()["state"][0]["step"] == 12
    used.fit_loop.max_epochs = 2
    used.fit(module, loader())


def test_checkpoint_callback_keeps_the_best_and_links_the_last(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", "val_loss", save_top_k=1, save_last="link")
    module, used = fit(tmp_path, "nvme", 3, callbacks=[keep], enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["epoch=2.ckpt", "last.ckpt"]
    (result,) = used.test(module, loader(2), ckpt_path="best", verbose=False)
    (again,) = trainer(tmp_path, "auto").test(Net(), loader(2), ckpt_path=keep.best_model_path, verbose=False)
    assert result["test_loss"] == pytest.approx(again["test_loss"], rel=1e-6)


def test_save_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, "nvme", 1, callbacks=[keep], enable_checkpointing=True)
    module, used = fit(tmp_path, "device", 1, tmp_path / "step=4.ckpt")
    assert used.global_step == 6
    oracle, _ = fit(tmp_path, "auto", 1, tmp_path / "step=4.ckpt")
    assert_close(weights(module), weights(oracle))


def test_weights_only_file(tmp_path: Path) -> None:
    module, used = fit(tmp_path, "nvme", 1)
    used.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert "optimizer_states" not in torch.load(tmp_path / "w.ckpt")
    fresh = net()
    trainer(tmp_path, "host").validate(fresh, loader(2), ckpt_path=tmp_path / "w.ckpt", verbose=False)
    assert_same(weights(fresh), weights(module))


def test_checkpoint_io_plugin_is_used(tmp_path: Path) -> None:
    calls: list[str] = []

    class Watched(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            calls.append(f"save {storage_options}")
            super().save_checkpoint(checkpoint, path)

        def remove_checkpoint(self, path: Any) -> None:
            calls.append("remove")
            super().remove_checkpoint(path)

    _, used = fit(tmp_path, "nvme", 1, plugins=[Watched()])
    used.save_checkpoint(tmp_path / "a.ckpt", storage_options="options")
    used.strategy.remove_checkpoint(tmp_path / "a.ckpt")
    assert calls == ["save options", "remove"]
    assert not (tmp_path / "a.ckpt").exists()


def test_mismatched_state_is_refused(tmp_path: Path, half: dict[str, Path]) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(3, 3)

    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"extra.weight\""):
        fit(tmp_path, "nvme", 4, half["nvme"], Other)

    class Loose(Other):
        strict_loading = False

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for n, p in self.named_parameters() if "extra" not in n], lr=1e-2)

    module, _ = fit(tmp_path, "nvme", 2, half["nvme"], Loose)
    assert_same({k: v for k, v in weights(module).items() if "extra" not in k}, torch.load(half["nvme"])["state_dict"])


def test_hooks_edit_what_is_saved_and_loaded(tmp_path: Path) -> None:
    class Renaming(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = OrderedDict((f"x.{k}", v) for k, v in checkpoint["state_dict"].items())
            checkpoint["mine"] = 7

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert checkpoint["mine"] == 7
            checkpoint["state_dict"] = OrderedDict((k[2:], v) for k, v in checkpoint["state_dict"].items())

    module, used = fit(tmp_path, "nvme", 1, kind=Renaming)
    used.save_checkpoint(tmp_path / "a.ckpt")
    assert all(name.startswith("x.") for name in torch.load(tmp_path / "a.ckpt")["state_dict"])
    again, _ = fit(tmp_path, "device", 1, tmp_path / "a.ckpt", Renaming)
    assert_same(weights(again), weights(module))


def test_untrusted_pickles_stay_refused_and_the_error_helps(tmp_path: Path) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"path": Path("x")}

    _, used = fit(tmp_path, "device", 1, callbacks=[Odd()])
    used.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"):
        fit(tmp_path, "device", 2, tmp_path / "a.ckpt", callbacks=[Odd()])


def test_tied_weights_and_metrics(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1][0].weight = self.blocks[0][0].weight

    module, used = fit(tmp_path, "nvme", 1, kind=Tied)
    used.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt")["state_dict"]
    assert saved["blocks.0.0.weight"].data_ptr() == saved["blocks.1.0.weight"].data_ptr()
    assert_close(saved, fit(tmp_path, "auto", 1, kind=Tied)[0].state_dict())
    assert module.blocks[1][0].weight is module.blocks[0][0].weight
