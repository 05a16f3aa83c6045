"""The ``zinf`` command: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reshards
import torch
from lightning_cases import assert_close, assert_same, loader, net, trainer
from pool import close_all, pool
from safetensors.torch import load_file
from sharded_cases import Model, everything, fit, memory_of

import lightning_zinf
from lightning_zinf.checkpoint.files import DTYPES
from lightning_zinf.checkpoint.reshard import cut
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of two ranks after one epoch, and what was in it."""
    folder = tmp_path_factory.mktemp("saved")
    state = pool(2).run(reshards.save, folder, "nvme", "bf16-mixed")[0]
    close_all()
    return folder / "half.ckpt", state


def test_consolidated_file_is_the_live_model(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = saved
    assert main(["consolidate", str(path), str(tmp_path / "one.ckpt"), "--memory-budget", "64KiB"]) == 0
    assert "load it with load_from_checkpoint" in capsys.readouterr().out
    whole = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert_same(dict(whole["state_dict"]), {k: v for k, v in state.items() if not k.startswith("optimizer")})
    for index, entry in whole["optimizer_states"][0]["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, state[f"optimizer 0, parameter {index}, {name}"])
    first, second = (whole["state_dict"][n] for n in ("again.weight", "blocks.0.0.weight"))
    assert first.data_ptr() == second.data_ptr()  # tied in the file too
    assert [p.name for p in tmp_path.iterdir()] == ["one.ckpt"]
    with zipfile.ZipFile(tmp_path / "one.ckpt") as archive:
        assert archive.testzip() is None  # every checksum


def test_views_of_one_tensor_stay_views(tmp_path: Path) -> None:
    """What callbacks and hooks keep may share memory, or be a part of more."""
    model, used = fit(tmp_path, "nvme", 1)
    base = torch.arange(10.0)
    parts = {"late": base[7:], "odd": base[1::2], "whole": base, "empty": base[:0], "other": torch.tensor(3)}
    model.on_save_checkpoint = lambda checkpoint: checkpoint.update(parts=parts)
    used.save_checkpoint(tmp_path / "a.ckpt")
    assert main(["consolidate", str(tmp_path / "a.ckpt"), str(tmp_path / "one.ckpt")]) == 0
    found = torch.load(tmp_path / "one.ckpt", weights_only=True)["parts"]
    assert_same(found, parts)
    assert found["late"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()
    with zipfile.ZipFile(tmp_path / "one.ckpt") as archive:
        assert archive.testzip() is None


def test_any_strategy_resumes_from_it(saved: Any, tmp_path: Path) -> None:
    path, _ = saved
    assert main(["consolidate", str(path), str(tmp_path / "one.ckpt")]) == 0
    loaded = Model.load_from_checkpoint(tmp_path / "one.ckpt")
    with torch.no_grad():
        assert torch.isfinite(loaded.eval()(torch.randn(2, 130))).all()
    ours, _ = fit(tmp_path, "nvme", 2, path=path)
    plain = net(Model)
    trainer(tmp_path, "auto", max_epochs=2).fit(plain, loader(8), loader(2), ckpt_path=tmp_path / "one.ckpt")
    assert_close(lightning_zinf.full_state_dict(ours), dict(plain.state_dict()), 1e-4)
    again, used = fit(tmp_path, "none", 2, path=tmp_path / "one.ckpt")
    assert_same(everything(again, used), everything(*fit(tmp_path, "nvme", 2, path=path)))


def test_weights_as_safetensors(saved: Any, tmp_path: Path) -> None:
    path, state = saved
    out = tmp_path / "hf"
    assert main(["consolidate", str(path), f"{out}/", "--max-shard-size", "100kB"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
    expected = {k: v for k, v in state.items() if not k.startswith("optimizer") and k != "again.weight"}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
    assert (
        main(["consolidate", str(path), str(tmp_path / "head"), "--format", "safetensors", "--strip-prefix", "head."])
        == 0
    )
    assert load_file(tmp_path / "head/model.safetensors").keys() == {"weight", "bias"}


def test_inspect_and_verify(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = saved
    assert main(["inspect", str(path), "--params"]) == 0
    text = capsys.readouterr().out
    assert f"{path}: 2 shards, " in text
    assert "weight (BF16/F32), residual (I16), exp_avg (F32)" in text
    assert "blocks.0.0.weight = again.weight  [130, 130]  F32" in text
    assert main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == sum(p.numel() for p in net(Model).parameters())
    assert main(["verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_refusals(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = saved
    there = tmp_path / "there.ckpt"
    there.write_text("precious")
    assert main(["consolidate", str(path), str(there)]) == 2
    assert "is there already: give another name, or --force" in capsys.readouterr().err
    assert there.read_text() == "precious"
    assert main(["consolidate", str(path), str(there), "--force"]) == 0
    assert main(["verify", str(tmp_path)]) == 1
    assert "has no manifest.json" in capsys.readouterr().err
    assert main(["inspect", str(there)]) == 1
    assert "is a file, and a sharded checkpoint is a folder" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not there" in capsys.readouterr().err
    assert main(["consolidate", str(path), "/proc/x.ckpt"]) == 1
    assert "No such file or directory: '/proc/.x.ckpt" in capsys.readouterr().err
    assert main(["consolidate", str(path), str(tmp_path / "new" / "folder" / "x.ckpt"), "--weights-only"]) == 0
    with pytest.raises(SystemExit) as usage:
        main(["consolidate", str(path), "x", "--memory-budget", "much"])
    assert usage.value.code == 2
    assert "'much' is no size: write 512MB or 2GiB" in capsys.readouterr().err


def test_a_damaged_file(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, used = fit(tmp_path, "nvme", 1)
    used.save_checkpoint(tmp_path / "a.ckpt")
    for pattern in ("shard-*", "module-*", "trainer-*"):
        file = next((tmp_path / "a.ckpt").glob(pattern))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert main(["verify", str(tmp_path / "a.ckpt")]) == 1
        assert f"{file.name} is damaged: block 0 (bytes 0 to " in capsys.readouterr().err
        assert main(["consolidate", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]) == 1
        assert not (tmp_path / "b.ckpt").exists()
        content[-1] ^= 1
        file.write_bytes(content)


def test_average(tmp_path: Path) -> None:
    """One file has the average for the weights, as Lightning's own checkpoints with a callback for it."""
    expected = reshards.average(0, 1, tmp_path, None, 1)  # which leaves the average
    path = tmp_path / "first.ckpt"
    commands = {"whole": [], "weights": ["--weights-only"], "last": ["--weights-only", "--current"]}
    found = {}
    for name, options in commands.items():
        assert main(["consolidate", str(path), str(tmp_path / name), *options]) == 0
        found[name] = torch.load(tmp_path / name, weights_only=True)
    for name in ("whole", "weights"):
        assert_same(dict(found[name]["state_dict"]), expected)
    assert_same(dict(found["whole"]["current_model_state"]), dict(found["last"]["state_dict"]))
    assert not torch.equal(found["last"]["state_dict"]["head.weight"], expected["head.weight"])
    assert not found["weights"].keys() & {"optimizer_states", "averaging_state", "averaging_buffers"}
    Model.load_from_checkpoint(tmp_path / "weights")
    resumed = reshards.average(0, 1, tmp_path / "again", tmp_path / "whole", 2)
    assert_same(resumed, reshards.average(0, 1, tmp_path / "uninterrupted", None, 2))
    for name, options in {"hf": [], "hf-last": ["--current"]}.items():
        assert main(["consolidate", str(path), f"{tmp_path / name}/", *options]) == 0
        tensors = load_file(tmp_path / name / "model.safetensors")
        state = found["last"]["state_dict"] if options else expected
        assert all(torch.equal(tensors[n], state[n]) for n in tensors)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """200 MB of state are written with little more than the budget beside what importing takes."""
    script = tmp_path / "big.py"
    script.write_text(
        "import sys, torch, lightning.pytorch as pl, lightning_zinf\n"
        "class Big(pl.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(16)])\n"
        "    def training_step(self, batch, i):\n"
        "        return self.net(batch).square().mean()\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.AdamW(self.parameters())\n"
        "trainer = pl.Trainer(strategy='zinf_stage_3_offload_nvme', accelerator='cpu', devices=1, max_steps=1,\n"
        "    logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=sys.argv[1])\n"
        "trainer.fit(Big(), torch.utils.data.DataLoader(torch.randn(2, 1024)))\n"
        "trainer.save_checkpoint(sys.argv[1] + '/big.ckpt')\n"
    )
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    used = memory_of(
        ["consolidate", f"{tmp_path}/big.ckpt", f"{tmp_path}/one.ckpt", "--memory-budget", "32MiB"],
        "lightning_zinf.checkpoint.consolidate",
    )
    assert (tmp_path / "one.ckpt").stat().st_size > 200e6
    assert used < 32 * 2**20 + 48 * 2**20  # checksums take a block of 16 MiB, the rest is Python's own


@pytest.mark.parametrize("shards", [1, 3])
def test_reshard(saved: Any, shards: int, tmp_path: Path) -> None:
    path, state = saved
    assert main(["reshard", str(path), str(tmp_path / "b.ckpt"), "--shards", str(shards)]) == 0
    assert main(["verify", str(tmp_path / "b.ckpt")]) == 0
    assert len(list((tmp_path / "b.ckpt").iterdir())) == shards + 3
    found = everything(*fit(tmp_path, "nvme", 1, path=tmp_path / "b.ckpt", precision="bf16-mixed"))
    assert_same(found, state)
    assert main(["reshard", str(path), str(tmp_path / "c.ckpt"), "--shards", "0"]) == 2


def test_shards_of_padding_are_refused(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = saved
    assert main(["reshard", str(path), str(tmp_path / "c.ckpt"), "--shards", "100000"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"100,000 shards would take [0-9.,]+ MiB of padding for [0-9.]+ MiB of values", said)
    most = int(re.search(r"ask for at most ([0-9,]+)", said)[1].replace(",", ""))  # type: ignore[index]
    with Checkpoint(path) as source:
        buffers = source.manifest.buffers
    cut(buffers, most)
    each = sum(DTYPES[d].itemsize for d in buffers[0].planes.values())
    large = replace(buffers[0], numel=2**40, params=(replace(buffers[0].params[0], shape=(2**40,), part=None),))
    (padded,) = cut((large,), 100_000)  # which is a lot to write, and little padding
    assert 0 <= (padded.numel - 2**40) * each <= 2**40 * each
    assert not (tmp_path / "c.ckpt").exists()
