"""Sharded checkpoints in one process: what is saved, what loads, what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cases import assert_same, loader, net, trainer
from safetensors.torch import load_file
from sharded_cases import SETTINGS, Model, everything, fit, strategy

import lightning_zinf
from lightning_zinf.checkpoint.manifest import CheckpointError
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.cli import main

PLACES = ["none", "cpu", "nvme"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """4 epochs without interruption, for each precision."""
    root = tmp_path_factory.mktemp("whole")
    return {p: everything(*fit(root, "none", 4, precision=p)) for p in ("32-true", "bf16-mixed")}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Checkpoints after 2 of them."""
    paths = {}
    for place in PLACES:
        for precision in ("32-true", "bf16-mixed"):
            root = tmp_path_factory.mktemp(place)
            _, used = fit(root, place, 2, precision=precision)
            paths[place, precision] = root / "half.ckpt"
            used.save_checkpoint(paths[place, precision])
    return paths


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("saved", PLACES)
@pytest.mark.parametrize("resumed", PLACES)
def test_resume_gives_the_bits_of_an_uninterrupted_run(
    tmp_path: Path, half: Any, whole: Any, saved: str, resumed: str, precision: Any
) -> None:
    model, used = fit(tmp_path, resumed, 4, path=half[saved, precision], precision=precision)
    assert used.global_step == 32
    assert_same(everything(model, used), whole[precision])


class Momentum(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)


def test_state_that_is_nothing_but_planes(tmp_path: Path) -> None:
    """Of SGD with momentum nothing is kept beside its plane: it goes on where it was, also by way of FSDP2's format."""
    _, used = fit(tmp_path, "nvme", 1, kind=Momentum)
    used.save_checkpoint(tmp_path / "half.ckpt")
    whole = everything(*fit(tmp_path, "none", 2, kind=Momentum))
    convert = ["convert", str(tmp_path / "half.ckpt"), str(tmp_path / "dcp.ckpt"), "--to", "dcp"]
    assert main(convert) == 0
    back = ["convert", str(tmp_path / "dcp.ckpt"), str(tmp_path / "back.ckpt"), "--from", "dcp", "--trust-pickle"]
    assert main(back) == 0
    for name, setting in (("half", "nvme"), ("half", "none"), ("back", "nvme")):
        assert_same(everything(*fit(tmp_path, setting, 2, path=tmp_path / f"{name}.ckpt", kind=Momentum)), whole)
    with pytest.raises(ValueError, match=r"has \['momentum_buffer'\], but AdamW keeps .*another optimizer"):
        fit(tmp_path, "nvme", 2, path=tmp_path / "half.ckpt")


def test_any_precision_into_any_other(tmp_path: Path, half: Any) -> None:
    """The masters are the same; only what compute reads of them differs."""
    for saved, given in (("bf16-mixed", "32-true"), ("32-true", "bf16-mixed"), ("32-true", "bf16-true")):
        model, used = net(Model), trainer(tmp_path, strategy("nvme"), precision=given)
        used.validate(model, loader(2), ckpt_path=half["nvme", saved], verbose=False)
        with Checkpoint(half["nvme", saved]) as source:
            for name, value in lightning_zinf.full_state_dict(model).items():
                assert torch.equal(value, source.tensor(name).to(value.dtype)), name


def test_files_are_safetensors_with_aligned_data(half: Any) -> None:
    path = half["nvme", "bf16-mixed"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(p.name for p in path.iterdir()) == sorted(["manifest.json", *(f["path"] for f in manifest["files"])])
    content = (path / manifest["shards"][0]).read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 4096 == 0
    tensors = load_file(path / manifest["shards"][0])
    for buffer in manifest["buffers"]:
        for plane in buffer["planes"]:
            assert tensors[f"{buffer['name']}/{plane}"].numel() == buffer["numel"]


def test_evaluation_and_other_strategies(tmp_path: Path, half: Any) -> None:
    path = half["none", "32-true"]
    results = []
    for place in PLACES:
        used = trainer(tmp_path, strategy(place))
        results.append(used.test(net(Model), loader(2), ckpt_path=path, verbose=False))
    assert results[0] == results[1] == results[2]
    with pytest.raises(Exception, match=r"half.ckpt"):  # a folder is nothing to the plain Trainer
        trainer(tmp_path, "auto").test(net(Model), loader(2), ckpt_path=path, verbose=False)


def test_whole_files_load_and_are_written_where_asked(tmp_path: Path, whole: Any) -> None:
    model, used = fit(tmp_path, "nvme", 2)
    used.strategy.state_dict_type = "full"
    used.save_checkpoint(tmp_path / "full.ckpt")
    assert (tmp_path / "full.ckpt").is_file()
    model, used = fit(tmp_path, "nvme", 4, path=tmp_path / "full.ckpt")
    assert_same(everything(model, used), whole["32-true"])
    used.save_checkpoint(tmp_path / "full.ckpt")  # a sharded one in the place of a file, and the other way round
    assert (tmp_path / "full.ckpt").is_dir()
    used.strategy.state_dict_type = "full"
    used.save_checkpoint(tmp_path / "full.ckpt")
    assert (tmp_path / "full.ckpt").is_file()


def test_keys_that_do_not_match(tmp_path: Path, half: Any) -> None:
    class More(Model):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(3, 3)
            del self.norm
            self.norm = torch.nn.LayerNorm(130)

    used = trainer(tmp_path, strategy("nvme"))
    with pytest.raises(RuntimeError, match=r"Missing key.*more.weight.*\n.*Unexpected key.*norm.running_mean"):
        used.test(net(More), loader(2), ckpt_path=half["none", "32-true"], verbose=False)

    class Loose(More):
        strict_loading = False

    model = net(Loose)
    used.test(model, loader(2), ckpt_path=half["none", "32-true"], verbose=False)
    with Checkpoint(half["none", "32-true"]) as source:
        assert torch.equal(lightning_zinf.full_state_dict(model)["head.weight"], source.tensor("head.weight"))

    class Wider(Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(130, 2)

    with pytest.raises(RuntimeError, match=r"size mismatch for head.weight.*\(1, 130\).*\(2, 130\)"):
        used.test(net(Wider), loader(2), ckpt_path=half["none", "32-true"], verbose=False)


class Buffers(Model):
    """Buffers of dtypes that nothing trains in: rotations as complex numbers, scales of quantized weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotations", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("turned", self.rotations.conj())
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64):
            self.register_buffer(str(dtype).replace(".", "_"), torch.arange(5).to(dtype))


def comparable(buffer: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(buffer.resolve_conj()) if buffer.is_complex() else buffer.double()


def test_buffers_of_other_dtypes(tmp_path: Path) -> None:
    trained, used = fit(tmp_path, "nvme", 1, kind=Buffers)
    used.save_checkpoint(tmp_path / "a.ckpt")
    expected = dict(trained.named_buffers())
    loaded = net(Buffers)
    for buffer in loaded.buffers():
        buffer.zero_()
    trainer(tmp_path, strategy("none")).validate(loaded, loader(1), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    with Checkpoint(tmp_path / "a.ckpt") as source:
        source.verify([info.path for info in source.manifest.files])
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(comparable(buffer), comparable(expected[name])), name


def test_what_hooks_remove_is_left_out(tmp_path: Path) -> None:
    class Adapter(Model):
        strict_loading = False

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for name in [n for n in checkpoint["state_dict"] if n.startswith("frozen")]:
                del checkpoint["state_dict"][name]

    model, used = fit(tmp_path, "nvme", 1, kind=Adapter)
    used.save_checkpoint(tmp_path / "adapter.ckpt")
    used.strategy.state_dict_type = "sharded"
    with Checkpoint(tmp_path / "adapter.ckpt") as source:
        assert not [n for n in source.names() if n.startswith("frozen")]
    again, _ = fit(tmp_path, "nvme", 1, path=tmp_path / "adapter.ckpt", kind=Adapter)
    assert_same(lightning_zinf.full_state_dict(again), lightning_zinf.full_state_dict(model))


def test_weights_only(tmp_path: Path, half: Any) -> None:
    model, used = fit(tmp_path, "nvme", 1)
    used.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with Checkpoint(tmp_path / "weights.ckpt") as source:
        assert not source.manifest.optimizers
        assert all(set(b.planes) <= {"weight", "residual"} for b in source.manifest.buffers)
    other = net(Model)
    trainer(tmp_path, strategy("none")).test(other, loader(2), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert_same(lightning_zinf.full_state_dict(other), lightning_zinf.full_state_dict(model))


def test_damage_is_named_and_changes_nothing(tmp_path: Path) -> None:
    model, used = fit(tmp_path, "nvme", 1)
    path = tmp_path / "a.ckpt"
    used.save_checkpoint(path)
    shard = next(path.glob("shard-*"))
    content = shard.read_bytes()
    before = lightning_zinf.full_state_dict(model)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            used.fit(model, loader(2), ckpt_path=path)
        assert_same(lightning_zinf.full_state_dict(model), before)

    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    shard.write_bytes(flipped)
    refused(rf"{shard.name} is damaged: block 0 ")
    shard.write_bytes(content[:-4096])
    refused(rf"{shard.name} has {len(content) - 4096} bytes instead of {len(content)}: it was cut off")
    shard.unlink()
    refused(rf"{shard.name} is missing: the checkpoint is not complete")
    shard.write_bytes(content)
    (path / "manifest.json").rename(path / "manifest.old")
    refused("has no manifest.json: .* whose saving did not end")


def test_settings_have_places() -> None:
    assert set(PLACES) < set(SETTINGS)
