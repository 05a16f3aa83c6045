"""Signal handlers that wait for the end of a batch.

Note [Deferred signals]
~~~~~~~~~~~~~~~~~~~~~~~
Python runs a signal's handler between any two bytecodes of the main thread, so also while the engine moves a unit, or
between the updates of two buffers. A handler that saves a checkpoint there, as Lightning's does when SLURM is about to
end a job, would find a mixture of two steps, or an engine that is not itself; and with several ranks each would be at
another place when the handler wants to meet the others.

So during training, and in the sanity check before it, a handler is put off: the signal is noted, and the handler runs
before the next training batch. With several ranks it runs once the signal has come to all of them, before the same
batch. One that came only to some ranks is handled there after ``GRACE``.

SIGTERM is Lightning's: its handler broadcasts a flag to all ranks, so all ranks run it as soon as one has the signal,
before the same batch.

When training ends, handlers are given back to their signals between two rounds: what came before the first, or while
it was under way and its handlers ran, is handled then, and what comes later is handled at once. After an exception what
is noted still is dropped, with a warning: there may be parts of a step, and other ranks may be gone.

Left alone are the signals whose handlers mean to stop what runs now (SIGINT, timers), and those of faults and children.
"""

from __future__ import annotations

import inspect
import logging
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds that a signal may take to come to all ranks."""
_NAMES_LEFT_ALONE = (
    *("SIGINT", "SIGKILL", "SIGSTOP", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGCHLD"),
    *("SIGSEGV", "SIGFPE", "SIGILL", "SIGBUS", "SIGABRT", "SIGTRAP", "SIGSYS", "SIGBREAK", "CTRL_C_EVENT"),
)
LEFT_ALONE = frozenset(getattr(signal, name) for name in _NAMES_LEFT_ALONE if hasattr(signal, name))
TOGETHER = frozenset({signal.SIGTERM})
"""Handlers that talk to the other ranks: all run them once one rank has the signal."""
_CELL = struct.Struct("<Id")

Handler = Callable[[int, FrameType | None], object]


class DeferredSignals:
    """Notes signals instead of handling them, until somebody says that now is the time.

    From its construction on, every Python handler of a signal that is not ``LEFT_ALONE`` is put off, until
    :meth:`release`. Outside of the main thread, where no handler can be set, nothing is.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, list[Handler]] = {}  # each displaced the one before it
        self._since: dict[int, float] = {}
        self._running: dict[int, int] = {}  # which of them runs now
        self._released = False
        self.adopt()

    def adopt(self) -> None:
        """Put off handlers that were installed since."""
        if self._released or threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals() - LEFT_ALONE:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._note:
                known = self._handlers.setdefault(number, [])
                if handler in known:  # somebody gave it back
                    del known[known.index(handler) :]
                known.append(handler)
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        running = self._running.get(number, len(self._handlers[number]) - 1 if self._released else 0)
        if running > 0:  # a handler calls the one that it found, which was this
            self._call(number, running - 1)
        elif not self._released:
            self._since.setdefault(number, time.monotonic())

    def _call(self, number: int, which: int) -> None:
        before = self._running.get(number)
        self._running[number] = which
        try:
            self._handlers[number][which](number, inspect.currentframe())
        finally:
            if before is None:
                del self._running[number]
            else:
                self._running[number] = before

    def tell(self) -> bytes:
        """Return what the other ranks need to know: which signals wait here, and for how long."""
        now = time.monotonic()
        return b"".join(_CELL.pack(number, now - since) for number, since in list(self._since.items()))

    def handle(self, told: Sequence[bytes], *, last: bool = False) -> None:
        """Run the handlers whose time has come.

        Args:
            told: What each rank told, this one included, by rank. All ranks have to be given the same.
            last: Whether there is no later time, so that signals which only some ranks have are due as well.
        """
        for number in due(told, last=last):
            if (self._since.pop(number, None) is not None or number in TOGETHER) and number in self._handlers:
                ranks = sum(number in _waits(message) for message in told)
                if ranks < len(told) and number not in TOGETHER:
                    log.warning(
                        f"{_name(number)} came to {ranks} of {len(told)} ranks: its handler runs on those alone, and "
                        "must not need the others. Send the signal to all processes"
                    )
                self._call(number, len(self._handlers[number]) - 1)
        self.adopt()

    def give_back(self) -> None:
        """Give handlers back to their signals: what comes from now on is handled at once, what is noted waits still."""
        if threading.current_thread() is threading.main_thread():
            for number, handlers in self._handlers.items():
                if signal.getsignal(number) == self._note:
                    signal.signal(number, handlers[-1])
        self._released = True  # only now: until it is given back, a signal is noted

    def release(self) -> None:
        """Give handlers back to their signals; say which ones were not run, and never will be."""
        self.give_back()
        if self._since:
            names = ", ".join(map(_name, sorted(self._since)))
            log.warning(f"training ended before the handlers of these signals could run: {names}")
        self._since = {}


def due(told: Sequence[bytes], *, last: bool = False) -> list[int]:
    """Return the signals to handle now, the same on all ranks, lowest first.

    Args:
        told: What each rank told.
        last: Whether there is no later time.
    """
    waits = [_waits(message) for message in told]
    return [
        number
        for number in sorted(set().union(*waits))
        if last
        or number in TOGETHER
        or all(number in w for w in waits)
        or max(w.get(number, 0.0) for w in waits) >= GRACE
    ]


def _waits(message: bytes) -> dict[int, float]:
    cells: Iterable[tuple[int, float]] = _CELL.iter_unpack(message)
    return dict(cells)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last
        return f"signal {number}"
