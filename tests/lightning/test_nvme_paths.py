"""Several NVMe paths, as users give them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning_cases import loader, net, trainer, zinf

from lightning_zinf.config import nvme_paths


def test_several_paths_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given to the strategy, or by the environment variable."""
    results = []
    for number, paths in enumerate(([], ["a", "b"], ["c", "d", "e"])):
        folders = [str(tmp_path / name) for name in paths]
        monkeypatch.setenv("ZINF_NVME_PATH", os.pathsep.join(folders if number == 2 else []))
        strategy = zinf("nvme", nvme_path=folders if number == 1 else None)
        module = net()
        used = trainer(tmp_path / str(number), strategy, limit_val_batches=0)
        used.fit(module, loader(4))
        traffic = used.strategy.engine.context.nvme.traffic()
        assert len(traffic) == max(1, len(paths))
        assert sum(read for read, _ in traffic) == used.strategy.engine.counters.nvme_read_bytes
        results.append(used.strategy.full_state_dict())
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_an_engine_stays_with_the_paths_that_it_has(tmp_path: Path) -> None:
    """A Trainer that names none takes the engine as it is; one that names others has the model partitioned anew."""
    module, first = net(), [str(tmp_path / "a"), str(tmp_path / "b")]
    engines = []
    for paths in (first, None, first[:1]):
        used = trainer(tmp_path, zinf("nvme", nvme_path=paths), limit_val_batches=0)
        used.fit(module, loader(2))
        engines.append(used.strategy.engine)
    assert engines[0] is engines[1]
    assert engines[0] is not engines[2]
    assert engines[2].config.nvme_paths == (first[0],)


def test_what_is_no_path_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="a folder or a list of folders, got 3"):
        zinf("nvme", nvme_path=3)
    with pytest.raises(ValueError, match="on a disk of this machine, got the URL 's3://bucket/x'"):
        zinf("nvme", nvme_path="s3://bucket/x")


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell turns it into the folder, YAML does not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZINF_NVME_PATH", "~/c")
    assert nvme_paths(["~/a", "/b"], "") == (str(tmp_path / "a"), "/b")
    assert nvme_paths(None, "") == (str(tmp_path / "c"),)
