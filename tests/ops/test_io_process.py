"""The I/O engine in processes of their own: limits, exit, fork, and a missing extension."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_zinf.ops.io import IOEngine


@pytest.fixture(params=["threads", "io_uring"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        with IOEngine(backend=request.param) as engine:
            if engine.backend == "python":
                pytest.skip("the compiled extension is missing")
    except ValueError as error:
        pytest.skip(str(error))
    return str(request.param)


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


LIMIT_SCRIPT = """
import errno, resource, signal, sys, torch
from lightning_zinf.ops.io import File, IOEngine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, backend = sys.argv[1:]
file = File(path, 1 << 20, preallocate=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
engine = IOEngine(backend=backend, block_bytes=4096)
data = torch.ones(1 << 20, dtype=torch.uint8)
try:
    engine.write(file, 0, data).wait()
except OSError as error:
    assert error.errno == errno.EFBIG and error.filename == path, error
else:
    sys.exit("the write succeeded")
assert engine.write(file, 0, data[: 1 << 19]).wait() == 1 << 19
for unlink in (True, False):
    try:
        File(path, 1 << 20, unlink=unlink)
    except OSError as error:
        assert error.errno == errno.EFBIG, error
    else:
        sys.exit("the creation succeeded")
"""


def test_file_size_limit(backend: str, tmp_path: Path) -> None:
    done = run_script(LIMIT_SCRIPT, tmp_path / "file", backend)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


EXIT_SCRIPT = """
import sys, torch
from lightning_zinf.ops.io import File, IOEngine
engine = IOEngine(backend=sys.argv[2])
file = File(sys.argv[1], 64 << 20, unlink=False)
engine.write(file, 0, torch.full((64 << 20,), 7, dtype=torch.uint8))
"""

FORK_SCRIPT = """
import os, sys, torch
from lightning_zinf.ops.io import File, IOEngine
engine = IOEngine(backend=sys.argv[2])
file = File(sys.argv[1], 64 << 20)
data = torch.full((64 << 20,), 7, dtype=torch.uint8)
tickets = [engine.write(file, 0, data) for _ in range(4)]
child = os.fork()
if child == 0:
    seen = torch.empty(4096, dtype=torch.uint8)
    assert engine.read(file, 0, seen).wait(60) == 4096
    if not tickets[-1].done():
        try:
            tickets[-1].wait(60)
        except ValueError as error:
            assert "parent process" in str(error)
    engine.close()
    file.close()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
for ticket in tickets:
    ticket.wait(60)
"""


def test_exit_drains_and_fork_is_safe(backend: str, tmp_path: Path) -> None:
    done = run_script(EXIT_SCRIPT, tmp_path / "exit", backend)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "exit").read_bytes() == b"\7" * (64 << 20)
    done = run_script(FORK_SCRIPT, tmp_path / "fork", backend)
    assert done.returncode == 0, done.stderr


MISSING_SCRIPT = """
import sys, warnings
sys.modules["lightning_zinf._ext"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from lightning_zinf.ops import io, memory
found = [str(w.message) for w in caught if "WITHOUT its compiled extension" in str(w.message)]
assert len(found) == 1, found
with io.IOEngine() as engine, io.File(sys.argv[1], 10000) as file:
    data = memory.host_empty(10000).random_()
    engine.write(file, 0, data).wait()
    seen = memory.host_empty(10000)
    engine.read(file, 0, seen).wait()
    assert engine.backend == "python" and (seen == data).all()
"""


def test_without_the_extension(tmp_path: Path) -> None:
    done = run_script(MISSING_SCRIPT, tmp_path / "file")
    assert done.returncode == 0, done.stderr
