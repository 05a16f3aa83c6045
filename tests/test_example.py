"""The example trains from its command line with its state on NVMe, learns, and logs what the docs say it logs."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "gpt"
CONFIGS = sorted((ROOT / "configs").glob("gpt_*.yaml"))


def run_example(folder: Path, *arguments: str) -> str:
    """Run the command line of the example and return what it printed."""
    pytest.importorskip("jsonargparse")
    command = [sys.executable, str(EXAMPLE / "train.py"), *arguments]
    # An own offload folder, so that tests at the same time do not meet; two threads, as the machines of a CI have.
    environment = os.environ | {"ZINF_NVME_PATH": str(folder / "nvme"), "OMP_NUM_THREADS": "2", "COLUMNS": "120"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def fit_small(folder: Path, *arguments: str) -> str:
    """Train with the tiny configuration, logging below ``folder``."""
    config = str(ROOT / "configs" / "gpt_small.yaml")
    return run_example(folder, "fit", "--config", config, "--trainer.logger.save_dir", str(folder / "runs"), *arguments)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read every scalar of the one TensorBoard run below ``folder`` as {tag: [(step, value)]}."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = (folder / "runs").rglob("events.out.tfevents.*")
    accumulator = accumulators.EventAccumulator(str(events.parent), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train once with the tiny configuration; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, fit_small(folder)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Import the modules of the example, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = ("model", "data")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


def test_loss_goes_down(trained: tuple[Path, str]) -> None:
    scalars = read_scalars(trained[0])
    train = [value for _, value in scalars["train/loss"]]
    val = [value for _, value in scalars["val/loss"]]
    # An untrained network gives every byte the same probability: ln 256 = 5.5 nats.
    assert train[-1] < 4.0
    assert train[-1] < train[0]
    assert val[-1] < val[0]
    assert [step for step, _ in scalars["train/loss"]] == list(range(4, 40, 5))


def test_tensorboard_has_the_curves(trained: tuple[Path, str]) -> None:
    scalars = read_scalars(trained[0])
    assert {"train/loss", "val/loss", "val/perplexity", "lr-AdamW/pg1", "lr-AdamW/pg2"} <= set(scalars)
    for (_, perplexity), (_, loss) in zip(scalars["val/perplexity"], scalars["val/loss"], strict=True):
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert {
        "zinf/nvme_read_bytes_per_step",
        "zinf/nvme_write_bytes_per_step",
        "zinf/stall_seconds_per_step",
        "zinf/resident_bytes/nvme",
    } <= set(scalars)
    # The state is on disk, so every step moves it both ways.
    for tag in ("zinf/nvme_read_bytes_per_step", "zinf/nvme_write_bytes_per_step", "zinf/resident_bytes/nvme"):
        assert all(value > 0 for _, value in scalars[tag]), tag
    # The cosine ends near a tenth of the highest rate.
    assert scalars["lr-AdamW/pg1"][-1][1] < 0.2 * 1e-2


def test_sample_and_log_folder_are_printed(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    assert "a sample" in printed
    assert "\ndef " in printed
    assert str(folder / "runs") in printed


def test_same_curve_as_without_the_strategy(trained: tuple[Path, str], tmp_path: Path) -> None:
    """Offloading moves numbers and does not change them: the plain Trainer gives the same losses."""
    rate = "lightning.pytorch.callbacks.LearningRateMonitor"
    fit_small(tmp_path, "--trainer.strategy", "auto", "--trainer.callbacks", rate)
    ours, plain = read_scalars(trained[0]), read_scalars(tmp_path)
    for tag in ("train/loss", "val/loss", "lr-AdamW/pg1"):
        assert [step for step, _ in ours[tag]] == [step for step, _ in plain[tag]]
        # Not bit for bit: torch's Adam rounds differently, and training amplifies the last bit.
        assert [v for _, v in ours[tag]] == pytest.approx([v for _, v in plain[tag]], rel=1e-3), tag


def test_help(tmp_path: Path) -> None:
    assert "fit" in run_example(tmp_path, "--help")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_parse(config: Path, tmp_path: Path) -> None:
    """Every key of every shipped configuration exists; ``--print_config`` checks them and runs nothing."""
    printed = run_example(tmp_path, "fit", "--config", str(config), "--print_config")
    assert "lightning_zinf" in printed
    assert "max_steps" in printed


def test_split_is_by_name_and_bounded(example: dict[str, ModuleType]) -> None:
    data = example["data"]
    train, val = data.read_library(400_000, 10)
    # One newline between two files comes on top of the bound.
    assert 390_000 < len(train) + len(val) < 402_000
    assert len(train) > len(val) > 0
    more_train, more_val = data.read_library(800_000, 10)
    # The last file of the smaller reading is cut, and each part may end there: all before that is the same.
    for less, more in ((train, more_train), (val, more_val)):
        assert torch.equal(less[: len(less) // 2], more[: len(less) // 2])


def test_windows_are_one_byte_apart(example: dict[str, ModuleType]) -> None:
    text = torch.arange(100, dtype=torch.uint8)
    inputs, targets = example["data"].Windows(text, 10, torch.tensor([7]))[0]
    assert inputs.tolist() == list(range(7, 17))
    assert targets.tolist() == list(range(8, 18))


def test_model_is_causal_and_tied(example: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    model = example["model"].GPT(block_size=16, width=32, depth=2, heads=2)
    assert model.head.weight is model.embedding.weight
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 8:] = 0
    torch.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.equal(model(tokens)[:, 8:], model(changed)[:, 8:])


def test_generate(example: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    model = example["model"].GPT(block_size=16, width=32, depth=1, heads=2)
    text = model.generate(b"def ", 30, temperature=0.8, top_k=5)  # longer than the context
    assert text.startswith(b"def ")
    assert len(text) == 34
    assert text == model.generate(b"def ", 30, temperature=0.8, top_k=5)
    assert model.generate(b"a", 5, temperature=0) == model.generate(b"a", 5, top_k=1)
    assert model.training
    with pytest.raises(ValueError, match="at least one byte"):
        model.generate(b"", 1)
