"""The engine on a simulated accelerator: what only streams and separate memory show.

Tests of it run in a process of their own, where nothing has run before: see ``simdevice/__init__.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simdevice.build import library

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="the simulated device is written for the latest version of torch"
)


def run(*arguments: str, **environment: str) -> None:
    library()  # compiled here, so that the tests' time is their own
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | environment
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    print(done.stdout.splitlines()[-1])


def test_the_device_and_the_engine() -> None:
    run("tests/simdevice/check_device.py", "tests/simdevice/check_engine.py", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_place_and_option() -> None:
    run("tests/simdevice/check_engine.py", "-m", "slow")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_trainer_on_the_device() -> None:
    run("tests/engine/test_gpu.py", "-k", "trainer or large", ZINF_TEST_DEVICE="sim")
