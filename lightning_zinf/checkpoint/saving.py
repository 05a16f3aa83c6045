"""A checkpoint on its way to disk, seen by all ranks alike.

Note [Saving in the background]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Each rank has a thread that writes its files and never talks to other ranks. What it has come to rides along when all
ranks meet anyway (before an optimizer step, a batch, a barrier): all see what all say, so all do the same next.

1. Once every rank has written and synced its files they exchange the checksums, and a thread of rank 0 writes the
   manifest, which is the commit.
2. Once rank 0 has committed, all are done with it.
3. If anything fails on any rank, all stop, remove what they have written, and raise the same. What was there before
   stays, also what was to be removed after the commit.

A checkpoint of the same state under another name (ModelCheckpoint's ``last.ckpt``, right after the best one) is made of
the same files, after the first commit: ``also``.

``wait`` does the same steps without training in between. With one rank the thread commits by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import FileInfo
from lightning_zinf.engine.snapshot import Snapshot
from lightning_zinf.memory.machine import free_host_bytes
from lightning_zinf.monitor.counters import Counters

if TYPE_CHECKING:
    from lightning_zinf.engine.engine import Engine

_MEETING = "saving a checkpoint"
_RUNNING: weakref.WeakSet[BackgroundSaving] = weakref.WeakSet()


class AnotherError(OSError):
    """What went wrong with a checkpoint that is made of another's files, which is complete."""


@dataclass(frozen=True)
class Plan:
    """What a rank does to save a checkpoint.

    Attributes:
        folder: The checkpoint.
        snapshot: This rank's shard.
        contents: What the checkpoint has beside the planes.
        write: Writes this rank's files; returns them, and what was read for them.
        commit: Makes the checkpoint complete, given the files of all ranks. For rank 0.
        undo: Removes this rank's files.
        restore: Undoes what was done to make room for the checkpoint, once all files have been removed.
    """

    folder: Folder
    snapshot: Snapshot
    contents: Any
    write: Callable[[], tuple[list[FileInfo], Counters]]
    commit: Callable[[Sequence[FileInfo]], None]
    undo: Callable[[Sequence[FileInfo]], None]
    restore: Callable[[], None]


class BackgroundSaving:
    """A checkpoint that is being saved; see Note [Saving in the background].

    Args:
        engine: The model's engine, which knows of it until it is over.
        plan: What to do.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine = engine
        self.plan = plan
        self._rank = 0 if engine.context.comm is None else engine.context.comm.ranks.rank
        self._lock = threading.Lock()
        self._state = "writing"
        self._error: BaseException | None = None
        self._files: list[FileInfo] = []
        self._moved = Counters()
        self._gathered = False
        self._later: list[Callable[[Sequence[FileInfo]], None]] = []
        self._thread = threading.Thread(target=self._write, name="zinf-save", daemon=True)
        _RUNNING.add(self)
        engine.saving = self
        self._thread.start()
        try:
            plan.snapshot.begin()
        except BaseException:
            self.abandon()
            raise

    # ------------------------------------------------------------------ in the threads

    def _write(self) -> None:
        with self._noting_failure(), torch.inference_mode(False), torch.no_grad():
            self._files, self._moved = self.plan.write()
            if self._engine.rounds is None:
                self._commit(self._files)
            else:
                self._state = "written"

    def _commit(self, files: Sequence[FileInfo]) -> None:
        self.plan.commit(files)
        while True:
            with self._lock:
                if not self._later:
                    self._state = "committed"
                    return
                later = self._later.pop(0)
            later(files)

    def _commit_apart(self, files: Sequence[FileInfo]) -> None:
        with self._noting_failure():
            self._commit(files)

    @contextlib.contextmanager
    def _noting_failure(self) -> Any:
        try:
            yield
        except BaseException as error:
            self.plan.snapshot.stop()
            self._error = error
            self._state = "failed"

    # ------------------------------------------------------------------ on the training thread

    def also(self, more: Callable[[Sequence[FileInfo]], None]) -> bool:
        """Do something with the files of all ranks after the commit; False if it is too late. For rank 0."""
        with self._lock:
            if self._state in ("committed", "failed"):
                return False
            self._later.append(more)
            return True

    def defer(self, removal: Callable[[], None]) -> bool:
        """Do something when the checkpoint is complete, and never if it cannot be saved; False if it is complete."""
        with self._lock:
            if self._state == "committed":
                return False
            self._later.append(functools.partial(_removing, removal))
            return True

    def settle(self) -> None:
        """See :class:`lightning_zinf.engine.snapshot.Saving`."""
        pager = self._engine.pager
        for unit in dict.fromkeys(pager.unit_with(buffer) for buffer in self.plan.snapshot.due()):
            pager.catch_up(unit)

    def poll(self, place: str) -> None:
        """See :class:`lightning_zinf.engine.snapshot.Saving`."""
        states = self._exchange(place)
        if states[0] == "committed":
            self._end()
        elif all(state == "written" for state in states):
            self._gather()

    def wait(self) -> None:
        """See :class:`lightning_zinf.engine.snapshot.Saving`."""
        self.settle()
        self._thread.join()
        if not self._gathered and self._engine.rounds is not None:
            self._exchange(_MEETING)
            self._gather()
            self._thread.join()
        self._exchange(f"the end of {_MEETING}")
        self._end()

    def abandon(self) -> None:
        """Give it up on this rank alone, unless rank 0 has all that it needs for the commit."""
        self.plan.snapshot.stop()
        self._thread.join()
        if self._state != "committed" and not (self._gathered and self._rank):
            self._undo()
            self._restore()
        self._end()

    def _exchange(self, place: str) -> list[str]:
        """Return how far each rank is.

        Raises:
            OSError: On all ranks, if any has failed.
        """
        error = "" if self._error is None else f"rank {self._rank}: {self._error}"
        if self._error is not None and not isinstance(self._error, AnotherError):
            error = f"{self.plan.folder.url} was not saved: {error}"
        said = [[self._state, error]]
        if self._engine.rounds is not None:
            said = [json.loads(a) for a in self._engine.rounds.meet(place, json.dumps(said[0]).encode())]
        errors = [text for state, text in said if state == "failed"]
        if errors:
            self._fail("; ".join(errors))
        return [state for state, _ in said]

    def _gather(self) -> None:
        """Give rank 0 the checksums, and have it commit."""
        assert self._engine.rounds is not None
        mine = json.dumps([asdict(info) for info in self._files]).encode()
        answers = self._engine.rounds.meet(f"the checksums of {_MEETING}", mine)
        self._gathered = True
        if self._rank == 0:
            files = [FileInfo(f["path"], f["nbytes"], tuple(f["crc32"])) for a in answers for f in json.loads(a)]
            self._state = "committing"
            self._thread = threading.Thread(target=self._commit_apart, args=(files,), name="zinf-save", daemon=True)
            self._thread.start()

    def _fail(self, why: str) -> None:
        self.plan.snapshot.stop()
        self._thread.join()
        self._undo()
        self._end()
        if self._engine.rounds is not None:
            self._engine.rounds.meet(f"the end of undoing {_MEETING}")
        self._restore()
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error
        raise OSError(why) from self._error

    def _undo(self) -> None:
        with contextlib.suppress(OSError):  # the disk that failed may fail again
            self.plan.undo(self._files)

    def _restore(self) -> None:
        with contextlib.suppress(OSError):
            self.plan.restore()

    def _end(self) -> None:
        self.plan.snapshot.stop()
        for held in self.plan.snapshot.held:
            if held.buffer.held is held:
                held.buffer.held = None
        kept = self.plan.snapshot.leftover()
        self._engine.context.spare_copies = kept if sum(m.numel() for m in kept) <= copy_room(self._engine) else []
        self._engine.counters.nvme_read_bytes += self._moved.nvme_read_bytes
        self._moved = Counters()
        self._engine.saving = None
        _RUNNING.discard(self)


def copy_room(engine: Engine) -> int:
    """Return the bytes of host memory that copies may take here: a quarter of what is free, for all ranks together."""
    comm = engine.context.comm
    return free_host_bytes() // (4 * (1 if comm is None else comm.ranks.local_size))


def _removing(removal: Callable[[], None], _: Sequence[FileInfo]) -> None:
    try:
        removal()
    except OSError as problem:
        warnings.warn(f"an older checkpoint was not removed: {problem}", stacklevel=1)


@atexit.register
def _stop_all() -> None:
    """Have no thread under way when the interpreter goes down; what was not complete by now will not be."""
    for saving in list(_RUNNING):
        saving.abandon()
