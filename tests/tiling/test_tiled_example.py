"""The example whose layers are larger than the budget trains with one option of its YAML, and not without."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_example import ROOT, run_example

CONFIG = str(ROOT / "configs" / "gpt_wide.yaml")
SHORT = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--model.sample_bytes", "0"]


@pytest.mark.slow
def test_it_trains(tmp_path: Path) -> None:
    run_example(tmp_path, "fit", "--config", CONFIG, "--trainer.logger.save_dir", str(tmp_path / "runs"), *SHORT)


@pytest.mark.slow
def test_it_does_not_without_the_option(tmp_path: Path) -> None:
    option = ["--trainer.strategy.init_args.tiling.max_tile_bytes", str(10**9)]
    with pytest.raises(AssertionError, match=r"the largest unit of the model needs 4\.02 MiB of memory"):
        run_example(tmp_path, "fit", "--config", CONFIG, *SHORT, *option)
