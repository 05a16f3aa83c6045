"""Signal handlers that wait for the end of a batch.

Note [Deferred signals]
~~~~~~~~~~~~~~~~~~~~~~~
Python runs a signal's handler between any two bytecodes of the main thread, so also while the engine moves a unit, or
between the updates of two buffers. A handler that saves a checkpoint there, as Lightning's does when SLURM is about to
end a job, would find a mixture of two steps, or an engine that is not itself; and with several ranks each would be at
another place when the handler wants to meet the others.

So during training a handler is put off: the signal is noted, and the handler runs before the next training batch. With
several ranks it runs once the signal has come to all of them, before the same batch. One that came only to some ranks
is handled there after ``GRACE``.

Left alone are the signals whose handlers mean to stop what runs now (SIGINT, timers), those of faults and children, and
SIGTERM, for which Lightning only sets a flag that it looks at between batches.
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
    *("SIGINT", "SIGTERM", "SIGKILL", "SIGSTOP", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGCHLD"),
    *("SIGSEGV", "SIGFPE", "SIGILL", "SIGBUS", "SIGABRT", "SIGTRAP", "SIGSYS", "SIGBREAK", "CTRL_C_EVENT"),
)
LEFT_ALONE = frozenset(getattr(signal, name) for name in _NAMES_LEFT_ALONE if hasattr(signal, name))
_CELL = struct.Struct("<Id")

Handler = Callable[[int, FrameType | None], object]


class DeferredSignals:
    """Notes signals instead of handling them, until somebody says that now is the time.

    From its construction on, every Python handler of a signal that is not ``LEFT_ALONE`` is put off, until
    :meth:`release`. Outside of the main thread, where no handler can be set, nothing is.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._since: dict[int, float] = {}
        self.adopt()

    def adopt(self) -> None:
        """Put off handlers that were installed since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals() - LEFT_ALONE:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._note:
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._since.setdefault(number, time.monotonic())

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
            if self._since.pop(number, None) is not None:
                ranks = sum(number in _waits(message) for message in told)
                if ranks < len(told):
                    log.warning(
                        f"{_name(number)} came to {ranks} of {len(told)} ranks: its handler runs on those alone, and "
                        "must not need the others. Send the signal to all processes"
                    )
                self._handlers[number](number, inspect.currentframe())
        self.adopt()

    def release(self) -> None:
        """Give handlers back to their signals; say which ones were not run."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                if signal.getsignal(number) == self._note:
                    signal.signal(number, handler)
        if self._since:
            names = ", ".join(map(_name, sorted(self._since)))
            log.warning(f"training ended before the handlers of these signals could run: {names}")
        self._handlers, self._since = {}, {}


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
        if last or all(number in w for w in waits) or max(w.get(number, 0.0) for w in waits) >= GRACE
    ]


def _waits(message: bytes) -> dict[int, float]:
    cells: Iterable[tuple[int, float]] = _CELL.iter_unpack(message)
    return dict(cells)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last
        return f"signal {number}"
