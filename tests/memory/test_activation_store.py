"""Activations away from the device: whatever the order, what comes back is what went."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_zinf.config import IOConfig
from lightning_zinf.layout import SHARD_ALIGNMENT, round_up
from lightning_zinf.memory.activation_room import Saved
from lightning_zinf.memory.activations import ActivationStore
from lightning_zinf.memory.link import DeviceLink
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import host_empty

IO = IOConfig(threads=2, backend="threads")
CPU = torch.device("cpu")
KINDS = ["nvme", "nvme-device", "host-device", "nvme-later-device", "host-later-device"]


class LaterCopy:
    """A copy that happens when it is waited for, or seen to be done: what is changed before is copied changed."""

    def __init__(self, source: Tensor, host: Tensor, noise: random.Random) -> None:
        self._ends, self._noise, self._over = (source, host), noise, False

    def wait(self, timeout: float | None = None) -> int:
        if not self._over:
            self._ends[1].data.copy_(self._ends[0])  # versions tell when it was asked for, as on a stream
            self._over = True
        return self._ends[0].nbytes

    def done(self) -> bool:
        if self._noise.random() < 0.3:
            self.wait()
        return self._over


class LaterLink(DeviceLink):
    """Copies as a stream does: some time after it was asked to."""

    noise = random.Random(0)

    def down(self, source: Tensor, host: Tensor) -> Any:
        return LaterCopy(source, host, self.noise)

    def up(self, host: Tensor) -> Any:
        target = torch.full_like(host, 255)
        return target, LaterCopy(host, target, self.noise)

    def arrive(self, copy: Any) -> None:
        copy.wait()


class Slow:
    """A request that takes its time."""

    def __init__(self, ticket: Any, noise: random.Random) -> None:
        self._ticket, self._noise = ticket, noise

    def wait(self, timeout: float | None = None) -> int:
        time.sleep(self._noise.random() * 0.001)
        return int(self._ticket.wait(timeout))

    def done(self) -> bool:
        return self._noise.random() < 0.5 and bool(self._ticket.done())


class Refused:
    """A request that the drive refused."""

    def wait(self, timeout: float | None = None) -> int:
        raise OSError(errno.EIO, "Input/output error", "zinf.state")

    def done(self) -> bool:
        return True


@contextmanager
def store_of(
    kind: str, folder: str | Path, budget: int, noise: random.Random | None = None
) -> Iterator[tuple[ActivationStore, Counters]]:
    counters = Counters()
    nvme = NvmeStore(folder, IO, counters) if kind.startswith("nvme") else None
    if nvme is not None and noise is not None:
        read, write = nvme.read, nvme.write
        nvme.read = lambda *a: Slow(read(*a), noise)  # type: ignore[assignment,method-assign,misc]
        nvme.write = lambda *a: Slow(write(*a), noise)  # type: ignore[assignment,method-assign,misc]
    link = (LaterLink if "later" in kind else DeviceLink)(CPU, counters) if kind.endswith("device") else None
    store = ActivationStore(budget, host_empty, counters, nvme, link)
    try:
        yield store, counters
    finally:
        store.close()


def content(number: int, nbytes: int) -> Tensor:
    return torch.randint(0, 255, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def put(store: ActivationStore, source: Tensor) -> Saved:
    return store.put(source, source)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("ppgghdtb"), st.integers(0, 10**6)), max_size=60),
    st.integers(1, 6),
    st.booleans(),
)
def test_any_order_of_calls(kind: str, actions: list[tuple[str, int]], slots: int, slow: bool) -> None:
    """Put, get, hold what was got, let go, trample on it, end a backward."""
    saved: list[tuple[int, int, Saved]] = []
    held: list[tuple[Tensor, Tensor]] = []
    count = padded = 0
    with (
        TemporaryDirectory() as folder,
        store_of(kind, folder, slots * 8192, random.Random(0) if slow else None) as (store, counters),
    ):
        for action, number in actions:
            if action == "p":
                nbytes = (1, 4096, 5000, 8192)[number % 4]
                source = content(count, nbytes)
                saved.append((count, nbytes, put(store, source)))
                if "later" not in kind:
                    source.zero_()  # it was copied
                count, padded = count + 1, padded + round_up(nbytes, SHARD_ALIGNMENT)
            elif action in "ght" and saved:
                at = len(saved) - 1 if action == "g" and number % 2 else number % len(saved)
                seed, nbytes, handle = saved[at]
                found = store.get(handle)
                assert torch.equal(found, content(seed, nbytes))
                if action == "h":
                    held.append((found, found.clone()))
                elif action == "t":
                    found.fill_(7)
                    held = [(h, h.clone()) for h, _ in held]
                del found, handle
            elif action == "d" and saved:
                saved.pop(number % len(saved))
            elif action == "b":
                store.end_of_backward()
                held.clear()
            assert all(torch.equal(seen, then) for seen, then in held)  # nobody wrote there
        assert counters.activation_write_bytes == padded
        assert store.live == len(saved)
        saved.clear()
        held.clear()
        store.drain()
        assert store.live == 0
        assert store.resting_bytes == 0


@pytest.mark.parametrize("kind", ["nvme", "nvme-device"])
@pytest.mark.parametrize("slots", [2, 3, 8])
def test_in_the_order_of_backward_each_is_read_once_within_the_budget(kind: str, slots: int, tmp_path: Path) -> None:
    size, many = 4096, 8
    with store_of(kind, tmp_path, slots * size) as (store, counters):
        for _ in range(3):
            before = counters.snapshot()
            handles = [put(store, content(n, size)) for n in range(many)]
            while handles:
                assert torch.equal(store.get(handles[-1]), content(len(handles) - 1, size))
                handles.pop()
            store.end_of_backward()
            moved = counters.since(before)
            assert moved["activation_write_bytes"] == moved["nvme_write_bytes"] == many * size
            assert moved["activation_reused_bytes"] == slots * size
            assert moved["activation_read_bytes"] == moved["nvme_read_bytes"] == (many - slots) * size
        store.drain()
        assert counters.overcommits == counters.orphaned_slots == 0
        assert store.staging.peak <= slots * size  # type: ignore[union-attr]
        assert store.live == store.resting_bytes == 0
        assert store.heap is not None
        assert store.heap.reserved_bytes == 64 * 2**20  # and never more


def test_reads_run_ahead(tmp_path: Path) -> None:
    with store_of("nvme", tmp_path, 3 * 4096) as (store, counters):
        handles = [put(store, content(n, 4096)) for n in range(8)]
        store.get(handles[7])
        assert (counters.activation_reused_bytes, counters.activation_read_bytes) == (3 * 4096, 0)
        for number in (6, 5, 4):
            store.get(handles[number])
            assert counters.activation_read_bytes == (7 - number) * 4096  # the slot of the one before reads the next


def test_host_memory_is_used_again(tmp_path: Path) -> None:
    with store_of("host-device", tmp_path, 4096) as (store, counters):
        for _ in range(4):
            handles = [put(store, content(n, 5000)) for n in range(5)]
            assert store.resting_bytes == 5 * 8192
            for number in reversed(range(5)):
                assert torch.equal(store.get(handles[number]), content(number, 5000))
            del handles
            store.end_of_backward()
        assert store.staging.peak == 5 * 8192  # type: ignore[union-attr]
        assert counters.activation_write_bytes == counters.activation_read_bytes == 4 * 5 * 8192
        assert counters.device_to_host_bytes == counters.host_to_device_bytes == 4 * 5 * 5000


def test_a_write_that_fails_is_named_and_what_comes_after_works(tmp_path: Path) -> None:
    with store_of("nvme", tmp_path, 4096) as (store, _):
        assert store.nvme is not None
        write = store.nvme.write
        store.nvme.write = lambda *a: Refused()  # type: ignore[assignment,method-assign,misc]
        first = put(store, content(0, 4096))
        store.nvme.write = write  # type: ignore[method-assign]
        with pytest.raises(OSError, match=r"activations could not be written.*nvme_path") as caught:
            put(store, content(1, 4096))
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == "zinf.state"
        with pytest.raises(OSError, match=r"activations could not be written"):
            store.get(first)
        del first
        store.after_exception()
        handle = put(store, content(2, 4096))
        assert torch.equal(store.get(handle), content(2, 4096))
        del handle
        store.drain()
        assert store.live == store.resting_bytes == 0


def test_a_write_that_fails_is_said_even_if_nobody_wants_it_any_more(tmp_path: Path) -> None:
    with store_of("nvme", tmp_path, 8192) as (store, _):
        assert store.nvme is not None
        store.nvme.write = lambda *a: Refused()  # type: ignore[assignment,method-assign,misc]
        put(store, content(0, 4096))
        with pytest.raises(OSError, match=r"activations could not be written"):
            store.end_of_backward()
        assert store.live == store.resting_bytes == 0


def test_a_read_that_fails_is_named_and_may_be_tried_again(tmp_path: Path) -> None:
    with store_of("nvme", tmp_path, 4096) as (store, _):
        assert store.nvme is not None
        handles = [put(store, content(n, 4096)) for n in range(2)]
        read = store.nvme.read
        store.nvme.read = lambda *a: Refused()  # type: ignore[assignment,method-assign,misc]
        with pytest.raises(OSError, match=r"activations could not be read back.*nvme_path") as caught:
            store.get(handles[0])
        assert caught.value.errno == errno.EIO
        store.nvme.read = read  # type: ignore[method-assign]
        assert torch.equal(store.get(handles[0]), content(0, 4096))


@pytest.mark.parametrize("kind", ["nvme-later-device", "host-later-device"])
def test_what_is_changed_while_it_is_copied_is_refused(kind: str, tmp_path: Path) -> None:
    LaterLink.noise, refused = random.Random(3), 0
    with store_of(kind, tmp_path, 8 * 4096) as (store, _):
        for _ in range(20):
            sources = [content(n, 4096) for n in range(3)]
            handles = [put(store, source) for source in sources]
            copying = handles[1].record.copy
            sources[1].zero_()
            for number in (0, 2):
                assert torch.equal(store.get(handles[number]), content(number, 4096))
            if copying is None:
                assert torch.equal(store.get(handles[1]), content(1, 4096))
            else:
                refused += 1
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    store.get(handles[1])
        assert 0 < refused < 20
        del handles
        store.drain()
        assert store.live == store.resting_bytes == 0


def test_after_close_it_says_so(tmp_path: Path) -> None:
    with store_of("nvme", tmp_path, 4096) as (store, _):
        handle = put(store, content(0, 10))
    with pytest.raises(RuntimeError, match="before the model was given back"):
        store.get(handle)


def test_memory_is_used_again_when_copies_to_the_device_are_done() -> None:
    with store_of("host-later-device", ".", 1 << 20) as (store, _):
        for step in range(5):
            saved = [put(store, content(number, 8192)) for number in range(4)]
            for number in reversed(range(4)):
                assert torch.equal(store.get(saved.pop()), content(number, 8192))
            store.end_of_backward()
            assert store.staging.total <= 8 * 8192, step
