"""Checkpoints that DeepSpeed wrote, for each stage: every value comes over, and training goes on."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from deepspeed_golden import STEPS, Tiny, groups
from hypothesis import given
from hypothesis import strategies as st
from lightning_cases import trainer
from safetensors.torch import load_file
from sharded_cases import memory_of, strategy
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_zinf
from lightning_zinf.checkpoint.deepspeed import _undone
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.cli import main

GOLDEN = Path(__file__).parent / "deepspeed"


class Resumed(Tiny, pl.LightningModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(groups(self), lr=0.05, betas=(0.9, 0.95))


def convert(source: Path, out: Path) -> int:
    return main(["convert", str(source), str(out), "--from", "deepspeed", "--trust-pickle"])


def fit(folder: Path, path: Path, steps: int) -> tuple[Any, Any]:
    torch.manual_seed(9)
    model = Resumed()
    used = trainer(folder, strategy("nvme"), max_steps=steps, max_epochs=-1)
    used.fit(model, DataLoader(torch.arange(64) % 7, batch_size=4), ckpt_path=path)  # type: ignore[arg-type]
    return model, used


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_value_comes_over(stage: int, tmp_path: Path) -> None:
    folder = GOLDEN / f"stage-{stage}"
    expected = load_file(folder / "expected.safetensors")
    assert convert(folder, tmp_path / "a.ckpt") == 0
    assert main(["verify", str(tmp_path / "a.ckpt")]) == 0
    with Checkpoint(tmp_path / "a.ckpt") as source:
        assert source.names() == list(Tiny().state_dict())
        assert source.locations["head.weight"].names == ("embed.weight", "head.weight")
        seen = 0
        for key, value in expected.items():
            kind, name = key.split(" ")
            found = source.tensor(name, kind if kind.startswith("exp_avg") else None)
            assert found.dtype == value.dtype, key
            assert torch.equal(found, value), key
            seen += 1
        assert seen == 3 * 8 + 2 + 2  # trained ones with two moments, frozen ones, buffers
        rest = source.trainer()
        assert [int(e["step"]) for e in rest["optimizer_states"][0]["state"].values()] == [STEPS] * 8
        model = Tiny()
        names = {id(p): n for n, p in model.named_parameters()}
        order = [[names[id(p)] for p in group["params"]] for group in groups(model)]
        assert list(source.manifest.optimizers[0]) == [n for group in order for n in group]
        assert [len(g["params"]) for g in rest["optimizer_states"][0]["param_groups"]] == [len(n) for n in order]
        assert [g["weight_decay"] for g in rest["optimizer_states"][0]["param_groups"]] == [0.1, 0.0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_goes_on(stage: int, tmp_path: Path) -> None:
    expected = load_file(GOLDEN / f"stage-{stage}/expected.safetensors")
    assert convert(GOLDEN / f"stage-{stage}", tmp_path / "a.ckpt") == 0
    model, used = fit(tmp_path, tmp_path / "a.ckpt", STEPS)  # nothing is left to do
    assert used.global_step == STEPS
    state = lightning_zinf.full_state_dict(model)
    for key, value in expected.items():
        kind, name = key.split(" ")
        if not kind.startswith("exp_avg"):
            assert torch.equal(state[name], value.to(state[name].dtype)), key
    saved = used.optimizers[0].state_dict()
    names = {id(p): n for n, p in model.named_parameters()}
    order = [names[id(p)] for g in used.optimizers[0].param_groups for p in g["params"]]
    for number, entry in saved["state"].items():
        assert int(entry["step"]) == STEPS
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[kind], expected[f"{kind} {order[number]}"]), (kind, order[number])

    plain = Tiny()
    plain.load_state_dict(copy.deepcopy(state))
    optimizer = torch.optim.AdamW(groups(plain))
    optimizer.load_state_dict(saved)
    plain(torch.arange(4)).backward()
    optimizer.step()
    model, used = fit(tmp_path, tmp_path / "a.ckpt", STEPS + 1)
    assert used.global_step == STEPS + 1
    for name, value in lightning_zinf.full_state_dict(model).items():
        torch.testing.assert_close(value, plain.state_dict()[name], atol=1e-6, rtol=0)


def test_what_is_said_of_a_checkpoint_without_lightning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--from", "deepspeed", "--trust-pickle", "--json"]
    assert main(["convert", str(GOLDEN / "stage-3/global_step3"), str(tmp_path / "a.ckpt"), *arguments]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert "training goes on from optimizer step 3" in notes[0]
    assert notes[1] == "the client state is left out: epoch"
    assert main(["convert", str(GOLDEN / "stage-2"), str(tmp_path / "b.ckpt"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    with Checkpoint(tmp_path / "b.ckpt") as source:  # all that Lightning had
        assert source.trainer()["lr_schedulers"][0]["last_epoch"] == 1
        assert source.trainer()["loops"]["fit_loop"]["epoch_loop.state_dict"] == {"_batches_that_stepped": 3}


@given(st.lists(st.integers(), unique=True, max_size=20), st.integers(1, 6))
def test_dealing_out_is_undone(items: list[int], parts: int) -> None:
    names = [str(i) for i in items]
    dealt = [name for part in range(parts) for name in names[part::parts]]
    assert _undone(dealt, parts) == names


# ---------------------------------------------------------------------- what is refused


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_is_read_without_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(GOLDEN / "stage-1"), str(tmp_path / "a.ckpt"), "--from", "deepspeed"]) == 2
    said = capsys.readouterr().err
    assert "DeepSpeed's files are pickles, which can run code" in said
    assert "say --trust-pickle" in said


def stage(tmp_path: Path, number: int = 1) -> tuple[Path, Path, Path]:
    """Copy a checkpoint; return it, its step's folder, and the last rank's file."""
    copied = tmp_path / "deepspeed"
    shutil.copytree(GOLDEN / f"stage-{number}", copied)
    folder = copied / (copied / "latest").read_text()
    return copied, folder, sorted(folder.glob("*_optim_states.pt"))[-1]


def refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert convert(copied, tmp_path / "out.ckpt") == 1
    assert not (tmp_path / "out.ckpt/manifest.json").exists()
    return capsys.readouterr().err


def test_code_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied, folder, file = stage(tmp_path)
    for path in (file, folder / "mp_rank_00_model_states.pt"):
        content = path.read_bytes()
        torch.save({"optimizer_state_dict": Malicious(tmp_path / "ran"), "module": {}}, path)
        said = refused(copied, tmp_path, capsys)
        assert path.name in said
        assert "system" in said
        assert not (tmp_path / "ran").exists()
        path.write_bytes(content)
    torch.save(Malicious(tmp_path / "ran"), file)
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # so the test would have seen it


def test_a_name_that_is_put_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """STACK_GLOBAL takes names from the stack, where no list of globals sees them."""

    copied, _, file = stage(tmp_path)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = [n for n in members if n.endswith("/data.pkl")]
    members[name] = pickle.dumps({"optimizer_state_dict": Malicious(tmp_path / "ran")}, protocol=4)
    assert b"\x93" in members[name]  # STACK_GLOBAL
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    said = refused(copied, tmp_path, capsys)
    assert file.name in said
    assert not (tmp_path / "ran").exists()


def test_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied, folder, file = stage(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert f"{file.name} is damaged, or no file of torch.save" in refused(copied, tmp_path, capsys)
    file.unlink()
    assert "was saved by 2 ranks, and has files of 1" in refused(copied, tmp_path, capsys)
    file.write_bytes(content)
    (folder / file.name.replace("bf16_", "")).write_bytes(content)
    assert "remove the older one" in refused(copied, tmp_path, capsys)
    (folder / file.name.replace("bf16_", "")).unlink()
    (folder / "mp_rank_00_model_states.pt").rename(folder / "gone")
    assert "mp_rank_00_model_states.pt is missing" in refused(copied, tmp_path, capsys)
    (folder / "gone").rename(folder / "mp_rank_00_model_states.pt")
    file.rename(file.with_name(file.name.replace("mp_rank_00", "mp_rank_01")))
    assert "model parallelism" in refused(copied, tmp_path, capsys)
    (copied / "latest").write_text("../elsewhere")
    assert "latest names '../elsewhere'" in refused(copied, tmp_path, capsys)
    (copied / "latest").unlink()
    assert "has neither a file 'latest' nor" in refused(copied, tmp_path, capsys)


@pytest.mark.parametrize("number", [1, 3])
def test_state_that_is_not_in_the_files(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An optimizer on NVMe leaves empty tensors."""
    copied, _, file = stage(tmp_path, number)
    content = _loaded(file)
    key = "fp32_flat_groups" if number == 3 else "single_partition_of_fp32_groups"
    content["optimizer_state_dict"][key] = [t[:0] for t in content["optimizer_state_dict"][key]]
    torch.save(content, tmp_path / "new.pt")  # the tensors are mapped from the old one
    (tmp_path / "new.pt").replace(file)
    assert "If the optimizer's state was on NVMe" in refused(copied, tmp_path, capsys)


def _loaded(file: Path) -> Any:
    """Return a file's content that torch.save takes: plain numbers for what stands for DeepSpeed's classes."""
    from lightning_zinf.checkpoint.unpickle import restricted_load

    content = restricted_load(file)
    state = content["optimizer_state_dict"]
    state["zero_stage"] = state["zero_stage"].arguments[0]
    for name in ("loss_scaler", "param_slice_mappings"):
        state.pop(name, None)
    return content


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Files of 192 MB, whose tensors are never in memory as a whole."""
    numel, world = 16 * 2**20, 2
    folder = tmp_path / "deepspeed"
    folder.mkdir()
    shape = (numel // 4096, 4096)
    for rank in range(world):
        parts = [torch.full((numel // world,), float(kind + 3 * rank)) for kind in range(3)]
        state = {
            "zero_stage": 2,
            "partition_count": [world],
            "single_partition_of_fp32_groups": parts[:1],
            "base_optimizer_state": {
                "state": {0: {"step": 5, "exp_avg": parts[1], "exp_avg_sq": parts[2]}},
                "param_groups": [{"lr": 0.1, "params": [0]}],
            },
        }
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    model = {"module": {"weight": torch.zeros(shape, dtype=torch.bfloat16)}, "param_shapes": [{"weight": shape}]}
    torch.save({**model, "global_steps": 5, "ds_config": {}}, folder / "mp_rank_00_model_states.pt")
    used = memory_of(
        ["convert", str(folder), str(tmp_path / "a.ckpt"), "--from", "deepspeed", "--trust-pickle"],
        "lightning_zinf.checkpoint.deepspeed",
        "lightning_zinf.checkpoint.convert",
    )
    assert used < 32 * 2**20, used  # a part of a tensor has 4 Mi elements, of 4 bytes
    with Checkpoint(tmp_path / "a.ckpt") as source:
        buffer = source.locations["weight"].places[0][0]
        for plane, values in (("weight", (0, 3)), ("exp_avg", (1, 4)), ("exp_avg_sq", (2, 5))):
            assert [source.plane(buffer, plane, i * numel // 2, i * numel // 2 + 1).item() for i in (0, 1)] == [*values]
