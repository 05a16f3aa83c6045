"""Small messages between ranks, all to all, in rounds.

Note [Channel]
~~~~~~~~~~~~~~
Before ranks start a collective they have to agree on which one (see ``rounds.py``), often many times a step, with a few
bytes. A collective of torch.distributed is made for the opposite: measured on two shared cores, a gloo all-gather of 64
bytes takes 0.4 ms among 2 ranks and 3.5 ms among 4; a message to rank 0 and its answer over a socket takes 0.06 ms.
So this is a star of TCP connections around rank 0, whose address goes through the process group's store.

Every frame is either a message or an error. Who fails tells rank 0, and rank 0 tells everybody, so that all ranks raise
the same text; a rank that was elsewhere finds it when it comes next.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

_HEADER = struct.Struct("<BI")
_MESSAGE, _ERROR = 0, 1
_TOKEN_BYTES = 16
GRACE_SECONDS = 5.0
"""How much longer than rank 0 the others wait, so that it is the one to say who is missing."""


class ChannelError(RuntimeError):
    """Another rank failed, left, or did not come."""


class Channel(Protocol):
    """Exchanges messages with all other ranks."""

    rank: int
    size: int
    broken: str | None

    def exchange(self, message: bytes, waiting: str) -> list[bytes]:
        """Send a message, and return those of all ranks by rank.

        Args:
            message: What to send.
            waiting: What this rank is doing, for the error that all ranks raise if somebody does not come.

        Raises:
            ChannelError: If a rank does not come in time, has left, or has failed.
        """

    def abort(self, reason: str) -> None:
        """Have every other rank raise ``reason`` when it comes next. Nothing can be exchanged after."""

    def close(self) -> None:
        """Close the connections."""


class StarChannel:
    """Every rank is connected to rank 0.

    Args:
        rank: This rank.
        size: Number of ranks.
        links: Connected sockets: on rank 0 those of ranks 1, 2, ...; else the one to rank 0.
        timeout: Seconds to wait for the others in a round.
    """

    def __init__(self, rank: int, size: int, links: Sequence[socket.socket], timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.broken: str | None = None
        self._links = list(links)
        self._timeout = timeout
        for link in self._links:
            if link.family != socket.AF_UNIX:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, message: bytes, waiting: str) -> list[bytes]:
        """See :class:`Channel`."""
        if self.broken is not None:
            raise ChannelError(self.broken)
        body = struct.pack("<I", len(message)) + message + waiting.encode()
        frames = self._as_hub(body) if self.rank == 0 else self._as_spoke(body)
        return [frame[4 : 4 + struct.unpack_from("<I", frame)[0]] for frame in frames]

    def _as_hub(self, body: bytes) -> list[bytes]:
        frames = [body] + [b""] * (self.size - 1)
        deadline = time.monotonic() + self._timeout
        late: list[int] = []
        for rank, link in enumerate(self._links, start=1):
            try:
                kind, frame = _receive(link, max(0.05, deadline - time.monotonic()))
            except TimeoutError:
                late.append(rank)
                continue
            except OSError:
                self._fail(f"rank {rank} has left: its process has ended or dropped the connection")
            if kind == _ERROR:
                self._fail(frame.decode(errors="replace"))
            frames[rank] = frame
        if late:
            told = "; ".join(
                f"rank {rank} {frame[4 + struct.unpack_from('<I', frame)[0] :].decode(errors='replace')}"
                for rank, frame in enumerate(frames)
                if frame
            )
            self._fail(
                f"rank {' and '.join(map(str, late))} did not come within {self._timeout:g} s ({told}). All ranks have "
                "to use the same parameters, and to reach the same optimizer steps and barriers: look for code that "
                "only some ranks run, such as `if rank == 0:`, or raise timeout=..."
            )
        answer = struct.pack("<I", self.size) + b"".join(struct.pack("<I", len(f)) + f for f in frames)
        for rank, link in enumerate(self._links, start=1):
            try:
                _send(link, _MESSAGE, answer)
            except OSError:
                self._fail(f"rank {rank} has left: its process has ended or dropped the connection")
        return frames

    def _as_spoke(self, body: bytes) -> list[bytes]:
        link = self._links[0]
        try:
            _send(link, _MESSAGE, body)
            kind, answer = _receive(link, self._timeout + GRACE_SECONDS)
        except TimeoutError:
            self._break(f"rank 0 did not answer within {self._timeout + GRACE_SECONDS:g} s")
        except OSError:
            self._break_with_last_words(link)
        if kind == _ERROR:
            self._break(answer.decode(errors="replace"))
        frames, at = [], 4
        for _ in range(self.size):
            (length,) = struct.unpack_from("<I", answer, at)
            frames.append(answer[at + 4 : at + 4 + length])
            at += 4 + length
        return frames

    def _break_with_last_words(self, link: socket.socket) -> None:
        """Rank 0 has left; what it said before is the reason."""
        try:
            kind, answer = _receive(link, GRACE_SECONDS)
            reason = answer.decode(errors="replace") if kind == _ERROR else ""
        except OSError:
            reason = ""
        self._break(reason or "rank 0 has left: its process has ended or dropped the connection")

    def _fail(self, reason: str) -> None:
        """Tell all others, and raise."""
        for link in self._links:
            _send_quietly(link, reason)
        self._break(reason)

    def _break(self, reason: str) -> None:
        self.broken = reason
        raise ChannelError(reason)

    def abort(self, reason: str) -> None:
        """See :class:`Channel`."""
        if self.broken is None:
            self.broken = reason
            for link in self._links:
                _send_quietly(link, reason)

    def close(self) -> None:
        """See :class:`Channel`."""
        self.broken = self.broken or "the channel between ranks is closed"
        for link in self._links:
            link.close()


def _send(link: socket.socket, kind: int, body: bytes) -> None:
    link.settimeout(None)
    link.sendall(_HEADER.pack(kind, len(body)) + body)


def _send_quietly(link: socket.socket, reason: str) -> None:
    with contextlib.suppress(OSError):  # it has left, or knows already
        _send(link, _ERROR, reason.encode())


def _receive(link: socket.socket, timeout: float) -> tuple[int, bytes]:
    link.settimeout(timeout)
    kind, length = _HEADER.unpack(_read(link, _HEADER.size))
    link.settimeout(max(timeout, GRACE_SECONDS))  # what has begun to arrive is on its way
    return kind, _read(link, length)


def _read(link: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = link.recv(count - len(parts))
        if not part:
            raise ConnectionError("closed")
        parts += part
    return bytes(parts)


def connect(store: Any, rank: int, size: int, timeout: timedelta, name: str) -> StarChannel:
    """Connect all ranks; every rank calls this.

    Args:
        store: The store of the process group.
        rank: This rank.
        size: Number of ranks.
        timeout: How long to wait for the others, now and in each round.
        name: Key in the store, new for each channel.

    Raises:
        ChannelError: If the ranks cannot be connected.
    """
    seconds = timeout.total_seconds()
    if rank == 0:
        return StarChannel(0, size, _accept(store, size, seconds, name), seconds)
    host = master_host(store)
    store.wait([name], timeout)
    port, token = store.get(name).decode().split()
    try:
        link = socket.create_connection((host, int(port)), timeout=seconds)
        link.sendall(bytes.fromhex(token) + struct.pack("<I", rank))
    except OSError as error:
        raise ChannelError(
            f"rank {rank} cannot connect to rank 0 at {host}, port {port} ({error}): set MASTER_ADDR to an address of "
            "rank 0 that all ranks can reach, and let the ports of a firewall between them open"
        ) from error
    return StarChannel(rank, size, [link], seconds)


def _accept(store: Any, size: int, seconds: float, name: str) -> list[socket.socket]:
    host = master_host(store)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        try:
            listener.bind((host, 0))
        except OSError:  # the address that others reach us by is not one of ours: behind a translation
            listener.bind(("", 0))
        listener.listen(size)
        token = secrets.token_bytes(_TOKEN_BYTES)  # so that only ranks, which know the store, are taken in
        store.set(name, f"{listener.getsockname()[1]} {token.hex()}")
        links: dict[int, socket.socket] = {}
        deadline = time.monotonic() + seconds
        while len(links) < size - 1:
            listener.settimeout(max(0.05, deadline - time.monotonic()))
            try:
                link, _ = listener.accept()
                link.settimeout(GRACE_SECONDS)
                greeting = _read(link, _TOKEN_BYTES + 4)
            except TimeoutError:
                missing = sorted(set(range(1, size)) - set(links))
                if time.monotonic() < deadline:
                    continue
                raise ChannelError(f"ranks {missing} did not connect to rank 0 within {seconds:g} s") from None
            except ConnectionError:
                continue
            (peer,) = struct.unpack_from("<I", greeting, _TOKEN_BYTES)
            if greeting[:_TOKEN_BYTES] == token and 0 < peer < size:
                links[peer] = link
            else:
                link.close()
        return [links[peer] for peer in range(1, size)]
    finally:
        listener.close()


def master_host(store: Any) -> str:
    """Return the host of rank 0, by the store that it serves; localhost if the store is no TCP server."""
    while hasattr(store, "underlying_store"):  # a store that adds a prefix to keys
        store = store.underlying_store
    return str(getattr(store, "host", "") or "127.0.0.1")
