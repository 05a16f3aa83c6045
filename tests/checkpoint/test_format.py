"""The format itself: the golden checkpoint, arithmetic, and files that are damaged at random."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import trained
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_cases import assert_same

import lightning_zinf
from lightning_zinf.checkpoint.contents import serialized
from lightning_zinf.checkpoint.files import Reader, Writer, header, raw_bytes
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import Buffer, CheckpointError, FileInfo, Manifest, Param
from lightning_zinf.checkpoint.source import Checkpoint

GOLDEN = Path(__file__).parent / "golden"


def test_golden_checkpoint_reads_for_ever(tmp_path: Path) -> None:
    expected = torch.load(GOLDEN / "golden.pt", weights_only=True)
    with Checkpoint(GOLDEN / "golden.ckpt") as source:
        source.verify([info.path for info in source.manifest.files])
        assert_same({name: source.tensor(name) for name in source.names()}, expected)
    model, trainer = trained(tmp_path, 2, GOLDEN / "golden.ckpt")
    assert trainer.global_step == 2
    assert_same(lightning_zinf.full_state_dict(model), expected)
    trained(tmp_path, 3, GOLDEN / "golden.ckpt")


def test_what_is_to_be_written_may_end_in_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the traceback of an error. Of a view of a BytesIO Python 3.12 and later complain; 3.12.1 crashes."""
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    cycle: list[Any] = [serialized({"epoch": 1})]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert complaints == []


@st.composite
def buffers(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int]:
    """Parameters as (offset, numel), elements of the buffer, and a number of shards."""
    params, end = [], 0
    for _ in range(draw(st.integers(1, 6))):
        offset = end + draw(st.integers(0, 9))
        end = offset + draw(st.integers(0, 40))
        params.append((offset, end - offset))
    shards = draw(st.integers(1, 5))
    return params, -(-max(end, 1) // shards) * shards, shards


@settings(max_examples=60, deadline=None)
@given(buffers(), st.data())
def test_every_range_is_read_from_the_right_shards(made: Any, data: st.DataObject) -> None:
    import tempfile

    params, numel, shards = made
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    with tempfile.TemporaryDirectory() as root:
        folder = Folder(root)
        infos = []
        for number in range(shards):
            writer = Writer(folder, f"shard-{number}")
            size = numel // shards
            writer.write(header({"b/weight": ("F32", (size,))}))
            writer.write(raw_bytes(values[number * size : (number + 1) * size]))
            infos.append(writer.finish())
        for name in ("module", "trainer"):
            writer = Writer(folder, name)
            writer.write(header({}))
            infos.append(writer.finish())
        described = tuple(Param((f"p{i}",), (n,), o, "F32") for i, (o, n) in enumerate(params))
        manifest = Manifest(
            tuple(f"shard-{i}" for i in range(shards)),
            "module",
            "trainer",
            (Buffer("b", numel, {"weight": "F32"}, described),),
            tuple(p.names[0] for p in described),
            files=tuple(infos),
        )
        folder.replace("manifest.json", manifest.to_json().encode())
        with Checkpoint(root) as source:
            assert source.manifest == manifest
            for i, (offset, n) in enumerate(params):
                assert torch.equal(source.tensor(f"p{i}"), values[offset : offset + n])
            start = data.draw(st.integers(0, numel))
            stop = data.draw(st.integers(start, numel))
            found = source.plane(source.manifest.buffers[0], "weight", start, stop)
            assert torch.equal(found, values[start:stop])


def test_damaged_manifests_are_refused(tmp_path: Path) -> None:
    """Whatever is changed in one is refused, or makes no difference to what is read."""
    text = (GOLDEN / "golden.ckpt/manifest.json").read_text()
    raw = json.loads(text)
    chance = random.Random(0)
    refused = 0

    def mutate(value: Any) -> Any:
        if isinstance(value, dict):
            key = chance.choice(list(value))
            return {k: mutate(v) if k == key else v for k, v in value.items() if k != key or chance.random() < 0.8}
        if isinstance(value, list) and value:
            at = chance.randrange(len(value))
            return [mutate(v) if i == at else v for i, v in enumerate(value)]
        return chance.choice([None, -1, 10**18, "x", [], {}, True, 1.5, value])

    for _ in range(500):
        try:
            Manifest.from_json(json.dumps(mutate(raw)), "manifest.json")
        except CheckpointError as error:
            assert "manifest.json" in str(error)  # noqa: PT017  # it may also be right
            refused += 1
    assert refused > 200
    for cut in range(0, len(text), 97):
        with pytest.raises(CheckpointError, match=r"manifest.json is not JSON"):
            Manifest.from_json(text[:cut], "manifest.json")
    with pytest.raises(CheckpointError, match="format version 3, and this lightning-zinf reads up to 2: upgrade"):
        Manifest.from_json(json.dumps({**raw, "version": 3}), "manifest.json")


def test_damaged_headers_are_refused(tmp_path: Path) -> None:
    name = json.loads((GOLDEN / "golden.ckpt/manifest.json").read_text())["shards"][0]
    content = (GOLDEN / "golden.ckpt" / name).read_bytes()
    chance = random.Random(1)
    length = len(json.dumps(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])))
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(8 + length)] = chance.randrange(256)
        (tmp_path / "a").write_bytes(damaged)
        try:
            reader = Reader(Folder(tmp_path), FileInfo("a", len(damaged), (0,)))
            for tensor in reader.tensors:
                reader.read(tensor)
        except CheckpointError as error:
            assert str(tmp_path / "a") in str(error)  # noqa: PT017  # it may also be right
        else:
            reader.close()


SAVER = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from golden import trained  # once for all processes: it takes longer than what they do
for _ in sys.stdin:
    process = os.fork()
    if process == 0:
        model, trainer = trained(Path(sys.argv[1]), 1)
        print(os.getpid(), flush=True)
        while True:
            trainer.save_checkpoint(sys.argv[1] + "/a.ckpt")
    os.waitpid(process, 0)
    print("dead", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_instant(tmp_path: Path) -> None:
    """50 saves over the same folder are killed; what is there is complete, or nothing is."""
    script = tmp_path / "saver.py"
    script.write_text(SAVER.format(path=[p for p in sys.path if p]))
    chance = random.Random(2)
    found = 0
    command = [sys.executable, script, tmp_path]
    savers = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert savers.stdin is not None
    assert savers.stdout is not None
    for _ in range(50):
        savers.stdin.write(b"go\n")
        savers.stdin.flush()
        saver = int(savers.stdout.readline())
        time.sleep(chance.random() * 0.03)
        os.kill(saver, signal.SIGKILL)
        assert savers.stdout.readline() == b"dead\n"
        if (tmp_path / "a.ckpt/manifest.json").exists():
            found += 1
            with Checkpoint(tmp_path / "a.ckpt") as source:
                source.verify([info.path for info in source.manifest.files])
                assert source.trainer()["global_step"] == 1
    savers.communicate()
    assert found > 25
