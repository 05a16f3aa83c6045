"""LightningCLI: YAML, command line, help (contract 2.3)."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning_cases import Net, loader

from lightning_zinf import IOConfig

pytest.importorskip("jsonargparse")
OURS = "lightning_zinf.ZinfStrategy"


class Loaded(Net):
    def train_dataloader(self) -> Any:
        return loader()


def cli(*arguments: str, run: bool = False) -> Any:
    return LightningCLI(
        Loaded,
        args=[*(["fit"] if run else []), "--trainer.accelerator=cpu", "--trainer.devices=1", *arguments],
        run=run,
        seed_everything_default=False,
        save_config_callback=None,
    )


def printed(*arguments: str) -> str:
    """What a command line that exits at once prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit):
        cli(*arguments)
    return out.getvalue() + err.getvalue()


def test_a_preset_by_name() -> None:
    strategy = cli("--trainer.strategy=zinf_stage_2_offload").trainer.strategy
    assert (strategy.stage, strategy.offload_optimizer) == (2, "cpu")


def test_options_on_the_command_line() -> None:
    strategy = cli(
        f"--trainer.strategy={OURS}",
        "--trainer.strategy.offload_optimizer=nvme",
        "--trainer.strategy.memory.host_bytes=1000000",
        "--trainer.strategy.io.backend=threads",
        "--trainer.strategy.overlap.prefetch=false",
        "--trainer.strategy.units=[Block]",
        "--trainer.strategy.timeout=0:10:00",
    ).trainer.strategy
    assert type(strategy).__module__ == "lightning_zinf.lightning"
    assert strategy.offload_optimizer == "nvme"
    assert strategy.memory.host_bytes == 1000000
    assert strategy.io.backend == "threads"
    assert not strategy.overlap.prefetch
    assert strategy.units == ["Block"]
    assert strategy._timeout.total_seconds() == 600


def test_yaml_trains(tmp_path: Path) -> None:
    options = {"stage": 3, "offload_params": "nvme", "offload_optimizer": "nvme", "io": {"tile_numel": 8192}}
    trainer = {
        "strategy": {"class_path": OURS, "init_args": options},
        "callbacks": [{"class_path": "lightning_zinf.ZinfMonitor"}],
        "fast_dev_run": 2,
        "default_root_dir": str(tmp_path),
        "enable_progress_bar": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": {"lr": 0.1}}))
    used = cli(f"--config={tmp_path / 'c.yaml'}", run=True)
    assert used.trainer.global_step == 2
    assert used.trainer.strategy.io.tile_numel == 8192
    assert used.trainer.strategy.engine.placement.params == "nvme"


def test_help_explains_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = printed(f"--trainer.strategy.help={OURS}")
    for expected in (
        "--trainer.strategy.stage {1,2,3}",
        "--trainer.strategy.offload_params {auto,none,cpu,nvme}",
        "Where optimizer state rests",
        "--trainer.strategy.memory.host_bytes HOST_BYTES",
        "Budgets for memory",
        "--trainer.strategy.io.backend {auto,threads,io_uring}",
        "Number of I/O threads.",
        "default: 0:30:00",
    ):
        assert expected in text
    for line in text.splitlines():  # every option has a text of its own
        assert not line.strip().startswith("(type:")


def test_print_config_shows_nested_options() -> None:
    text = printed(f"--trainer.strategy={OURS}", "--trainer.strategy.stage=2", "--print_config")
    shown = yaml.safe_load(text)["trainer"]["strategy"]["init_args"]
    assert shown["stage"] == 2
    assert shown["memory"]["unit_bytes"] == 16 * 2**20
    assert shown["io"]["threads"] == IOConfig().threads
    assert shown["tiling"] == {"max_tile_bytes": None}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.strategy.offlod_params=cpu", "offlod_params"),
        ("--trainer.strategy.memory.bytes_host=1", "bytes_host"),
        ("--trainer.strategy.stage=4", r"Literal[1, 2, 3]"),
        ("--trainer.strategy.io.threads=many", "many"),
    ],
)
def test_mistakes_are_named(argument: str, message: str) -> None:
    assert message in printed(f"--trainer.strategy={OURS}", argument)


def test_old_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_module = pytest.importorskip("pytorch_lightning.cli")
    import pytorch_lightning as old

    class Old(old.LightningModule):
        pass

    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    arguments = [f"--trainer.strategy={OURS}", "--trainer.strategy.stage=1", "--trainer.accelerator=cpu"]
    used = cli_module.LightningCLI(
        Old, args=[*arguments, "--trainer.devices=1"], run=False, seed_everything_default=False
    )
    assert type(used.trainer.strategy).__module__ == "lightning_zinf.pl"
    assert used.trainer.strategy.stage == 1


@pytest.mark.parametrize(("given", "expected"), [("/a", "/a"), ("[/a,/b]", ["/a", "/b"]), ("null", None)])
def test_one_path_or_several(given: str, expected: Any) -> None:
    strategy = cli(f"--trainer.strategy={OURS}", f"--trainer.strategy.nvme_path={given}").trainer.strategy
    assert strategy.nvme_path == expected


def test_the_timeline_by_its_class(tmp_path: Path) -> None:
    callback = {"class_path": "lightning_zinf.ZinfTimeline", "init_args": {"path": "t.json.gz", "steps": [1, 3]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    (made,) = [c for c in cli(f"--config={tmp_path / 'c.yaml'}").trainer.callbacks if hasattr(c, "steps")]
    assert (made.path, made.steps) == ("t.json.gz", (1, 3))
