"""Compiles the simulated device, once for each state of its sources and version of torch."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

TORCH = Path(torch.__file__).parent
HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "simdevice"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]


def library() -> Path:
    """Return the shared library, compiled if it is not there yet; several processes may call this at once.

    Raises:
        RuntimeError: It cannot be compiled; the message is the compiler's.
    """
    sources = sorted(HERE.glob("*.cpp"))
    known = hashlib.sha256(f"{torch.__version__} {torch.compiled_with_cxx11_abi()} {FLAGS}".encode())
    for path in [*sources, *sorted(HERE.glob("*.h"))]:
        known.update(path.read_bytes())
    target = FOLDER / f"sim-{known.hexdigest()[:16]}.so"
    if target.exists():
        return target
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        built = _compile(sources, Path(folder))
        os.replace(built, target)
    return target


def _compile(sources: list[Path], folder: Path) -> Path:
    compiler = os.environ.get("CXX", "g++")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    include = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    _run_all(
        [compiler, *FLAGS, abi, *include, "-c", str(source), "-o", str(out)]
        for source, out in zip(sources, objects, strict=True)
    )
    built = folder / "sim.so"
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-pthread"]
    _run_all([[compiler, "-shared", *map(str, objects), *libraries, "-o", str(built)]])
    return built


def _run_all(commands: Iterable[list[str]]) -> None:
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    told = [process.communicate()[0] for process in running]
    for process, output in zip(running, told, strict=True):
        if process.returncode:
            raise RuntimeError(f"the simulated device cannot be compiled: {' '.join(process.args)}\n{output}")
