"""ZinfTimeline: which steps it records, and where to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning_cases import loader, net, trainer, zinf

import lightning_zinf


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["traceEvents"]


def test_the_steps_that_are_asked_for_are_recorded(tmp_path: Path) -> None:
    timeline = lightning_zinf.ZinfTimeline("sub/steps.json", steps=(2, 4))
    used = trainer(tmp_path, "nvme", callbacks=[timeline], limit_val_batches=0)
    used.fit(net(), loader(8))
    assert used.strategy.engine.counters.trace is None
    found = events(tmp_path / "sub" / "steps-rank0.json")
    complete = [e for e in found if e["ph"] == "X"]
    assert sum(e["cat"] == "step" for e in complete) == 2
    # What the state's updates of a step need is read at its end, and they run when the next step begins.
    assert {e["cat"] for e in complete} >= {"forward", "backward", "gather", "update", "nvme_read", "nvme_write"}
    assert {e["pid"] for e in found} == {0}
    assert {e["name"] for e in complete if e["cat"] == "forward"} >= {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("stop", [6, 100])
def test_training_that_ends_first_saves_what_there_is(stop: int, tmp_path: Path) -> None:
    timeline = lightning_zinf.ZinfTimeline(steps=(4, stop))
    used = trainer(tmp_path, "nvme", callbacks=[timeline], limit_val_batches=0)
    used.fit(net(), loader(6))
    found = events(tmp_path / "timeline-rank0.json")
    assert sum(e.get("cat") == "step" for e in found) == 2


def test_an_exception_saves_what_led_to_it(tmp_path: Path) -> None:
    timeline = lightning_zinf.ZinfTimeline(steps=(0, 100))
    module = net()
    handle = module.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, "nvme", callbacks=[timeline]).fit(module, loader())
    handle.remove()
    assert any(e.get("name") == "blocks.1" for e in events(tmp_path / "timeline-rank0.json"))


def test_an_absolute_path_is_kept(tmp_path: Path) -> None:
    timeline = lightning_zinf.ZinfTimeline(str(tmp_path / "there" / "t.json.gz"), steps=(0, 1))
    trainer(tmp_path / "root", zinf("nvme"), callbacks=[timeline], limit_val_batches=0).fit(net(), loader(2))
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["t-rank0.json.gz"]


def test_steps_that_never_come_are_told(tmp_path: Path) -> None:
    timeline = lightning_zinf.ZinfTimeline(steps=(2, 4))
    with pytest.warns(UserWarning, match=r"recorded nothing: training ended at step 2, and steps=\(2, 4\)"):
        trainer(tmp_path, zinf(), callbacks=[timeline], limit_val_batches=0).fit(net(), loader(2))
    assert not list(tmp_path.glob("timeline*"))


@pytest.mark.parametrize("arguments", [{"steps": (2, 2)}, {"steps": (-1, 2)}, {"path": "timeline.txt"}])
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"steps must be|path must end"):
        lightning_zinf.ZinfTimeline(**arguments)


def test_another_strategy_is_told(tmp_path: Path) -> None:
    used = trainer(tmp_path, "auto", callbacks=[lightning_zinf.ZinfTimeline()], limit_val_batches=0)
    with pytest.warns(UserWarning, match="ZinfTimeline records nothing.*SingleDeviceStrategy"):
        used.fit(net(), loader(2))
    assert list(tmp_path.glob("*.json")) == []
