"""``Trainer(strategy="zinf")`` with no import of ours, and a boot module that never raises (contract 2.2)."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_zinf_boot as boot

NAMESPACES = pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])

TRAIN = """
import {package} as pl
from {package}.demos.boring_classes import BoringModel
import sys, torch

assert "lightning_zinf" not in sys.modules
class Model(BoringModel):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)
trainer = pl.Trainer(strategy={strategy!r}, accelerator="cpu", devices=1, fast_dev_run=2, enable_progress_bar=False)
trainer.fit(Model())
print(type(trainer.strategy), trainer.global_step)
"""


def run(script: str, folder: Path, **environment: str) -> str:
    """Run a script in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lightning_zinf", "-c", script],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@NAMESPACES
def test_trains_in_a_fresh_interpreter(tmp_path: Path, package: str) -> None:
    home = {"lightning.pytorch": "lightning_zinf.lightning", "pytorch_lightning": "lightning_zinf.pl"}[package]
    assert f"{home}.ZinfStrategy'> 2" in run(TRAIN.format(package=package, strategy="zinf"), tmp_path)


@NAMESPACES
def test_importing_us_registers_where_autoload_is_off(tmp_path: Path, package: str) -> None:
    script = f"""
import {package}.strategies as strategies
assert not [name for name in strategies.StrategyRegistry if "zinf" in name]
import lightning_zinf
assert "zinf" in strategies.StrategyRegistry
print(type(strategies.StrategyRegistry.get("zinf_stage_2_offload")))
"""
    printed = run(script, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "ZinfStrategy" in printed
    # And before Lightning is imported.
    script = f"import lightning_zinf, {package}.strategies as s; assert 'zinf' in s.StrategyRegistry"
    run(script, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_importing_us_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    run(
        "import sys, lightning_zinf; assert not {'torch', 'lightning', 'pytorch_lightning'} & set(sys.modules)",
        tmp_path,
    )


BREAK_PACKAGE = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning_zinf":
            raise RuntimeError("sabotaged")
sys.meta_path.insert(0, Broken())
"""


def test_a_broken_package_breaks_nobody_else(tmp_path: Path) -> None:
    script = f"""{BREAK_PACKAGE}
import torch
import lightning.pytorch as pl
pl.Trainer(accelerator="cpu", logger=False)
try:
    pl.Trainer(accelerator="cpu", strategy="zinf")
except RuntimeError as error:
    print("as it should:", error)
"""
    assert "as it should: sabotaged" in run(script, tmp_path)


@pytest.mark.parametrize(
    "sabotage",
    [
        "class L(list):\n    def insert(self, *a): raise RuntimeError\nsys.meta_path = L(sys.meta_path)",
        "import lightning_zinf_boot as b; b.HOMES['sys'] = 'x'; sys.StrategyRegistry = None",
        "import lightning_zinf_boot as b; b.Finder.__init__ = None\n"
        "sys.modules['logging'] = None; b.autoload(); del sys.modules['logging']",
        "import lightning_zinf_boot as b; b.Finder._find_elsewhere = lambda *a: 1 / 0",
        "import lightning_zinf_boot as b; b.PRESETS = None",
    ],
    ids=["meta_path", "registry", "no logging", "finder", "presets"],
)
def test_torch_and_lightning_import_whatever_is_broken(tmp_path: Path, sabotage: str) -> None:
    run(f"import sys\n{sabotage}\nimport torch, lightning.pytorch, pytorch_lightning", tmp_path)


def test_entry_point_is_installed() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch.backends", name="lightning_zinf")
    assert entry.value == "lightning_zinf_boot:autoload"


class Registry(dict[str, Any]):
    def register(self, name: str, build: Any, description: str, **options: Any) -> None:
        self[name] = (build, description, options)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a registry, which the boot module knows."""
    name = "zinf_fake_strategies"
    (tmp_path / f"{name}.py").write_text(
        "class R(dict):\n def register(s, n, *a, **k): s[n] = k\nStrategyRegistry = R()"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(boot.HOMES, name, "lightning_zinf.lightning")
    monkeypatch.setattr(
        sys, "meta_path", [boot.Finder(), *(f for f in sys.meta_path if not isinstance(f, boot.Finder))]
    )
    yield name
    sys.modules.pop(name, None)


def test_finder_leaves_no_trace_on_the_loader(fake: str) -> None:
    import inspect

    module = importlib.import_module(fake)
    assert set(module.StrategyRegistry) == set(boot.PRESETS)
    assert "exec_module" not in vars(module.__spec__.loader)
    assert "StrategyRegistry" in inspect.getsource(module)
    importlib.reload(module)
    assert set(module.StrategyRegistry) == set(boot.PRESETS)


def test_other_finders_are_asked_for_other_modules() -> None:
    assert boot.Finder().find_spec("json", None) is None


def test_a_name_that_is_taken_stays(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(zinf="theirs")
    boot.register(registry, "lightning_zinf.lightning")
    assert registry["zinf"] == "theirs"
    assert registry["zinf_stage_1_offload"][2] == {"stage": 1, "offload_optimizer": "cpu"}
    module = ModuleType("lightning.pytorch.strategies")
    boot._register_quietly(module)
    assert "could not register" in caplog.text


def test_autoload_twice_adds_one_finder() -> None:
    boot.autoload()
    boot.autoload()
    assert sum(isinstance(finder, boot.Finder) for finder in sys.meta_path) == 1
