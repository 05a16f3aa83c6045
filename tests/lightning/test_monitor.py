"""ZinfMonitor: what it logs, when, and that the byte counts are the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import PLACES, loader, net, trainer, zinf

import lightning_zinf

PER_STEP = (
    *("nvme_read_bytes", "nvme_write_bytes", "host_to_device_bytes", "device_to_host_bytes", "reused_bytes"),
    *("stall_read_seconds", "stall_write_seconds", "stall_gather_seconds", "stall_seconds", "update_seconds"),
)
PLAIN = (
    *("stall_share", "refills", "faults", "overcommits", "orphaned_slots"),
    *("resident_bytes/device", "resident_bytes/host", "resident_bytes/nvme"),
)
NAMES = {f"zinf/{name}_per_step" for name in PER_STEP} | {f"zinf/{name}" for name in PLAIN}


@pytest.mark.parametrize("place", PLACES)
def test_logs_everything(tmp_path: Path, place: str) -> None:
    kept: list[dict[str, Any]] = []

    class Kept(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            kept.append({**metrics, "step": step})

    logger = Kept(tmp_path)
    used = trainer(
        tmp_path, place, logger=logger, callbacks=[lightning_zinf.ZinfMonitor()], log_every_n_steps=4, max_epochs=2
    )
    used.fit(net(), loader(8), loader(2))
    logged = [row for row in kept if "zinf/faults" in row]
    assert [row["step"] for row in logged] == [3, 7, 11, 15]
    for row in logged:
        assert {name for name in row if name.startswith("zinf/")} == NAMES
        stalls = sum(row[f"zinf/stall_{kind}_seconds_per_step"] for kind in ("read", "write", "gather"))
        assert row["zinf/stall_seconds_per_step"] == pytest.approx(stalls)
    assert used.callback_metrics.keys() >= NAMES
    last = logged[-1]
    on_nvme = place == "nvme"
    assert (last["zinf/nvme_read_bytes_per_step"] > 0) == on_nvme
    assert (last["zinf/nvme_write_bytes_per_step"] > 0) == on_nvme
    assert (last["zinf/resident_bytes/nvme"] > 0) == on_nvme
    assert last["zinf/refills"] == 0
    assert 0 <= last["zinf/stall_share"] <= 1


def test_bytes_are_means_over_optimizer_steps(tmp_path: Path) -> None:
    monitor = lightning_zinf.ZinfMonitor()
    used = trainer(
        tmp_path,
        zinf("nvme"),
        callbacks=[monitor],
        log_every_n_steps=4,
        accumulate_grad_batches=2,
        limit_val_batches=0,
    )
    used.fit(net(), loader(8))
    counters = used.strategy.engine.counters.snapshot()
    assert used.global_step == 4
    # One optimizer step's update is still pending when the last line is written; it is written back in teardown.
    per_step = float(used.callback_metrics["zinf/nvme_write_bytes_per_step"])
    assert 0 < per_step <= counters["nvme_write_bytes"] / 2


def test_another_strategy_is_told_once(tmp_path: Path) -> None:
    used = trainer(tmp_path, "auto", callbacks=[lightning_zinf.ZinfMonitor()], log_every_n_steps=1)
    with pytest.warns(UserWarning, match="ZinfMonitor logs nothing.*SingleDeviceStrategy") as caught:
        used.fit(net(), loader())
    assert sum("ZinfMonitor" in str(w.message) for w in caught) == 1
    assert not any(name.startswith("zinf/") for name in used.callback_metrics)
