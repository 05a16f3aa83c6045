"""Agreement between ranks on the next collective.

Note [Rounds]
~~~~~~~~~~~~~
A collective needs all ranks, and hangs if they come with different ones. But ranks do not all want the same: experts
are routed differently, one has a batch more to predict, one looks at a weight. So before any collective the ranks hold
a round: each says what it is up to, and all draw the same conclusion from what all said.

- **want**: this rank needs units. Everybody takes part in gathering the union of what is wanted, wanted by himself or
  not, and those who wanted look whether they have all now.
- **pause**: this rank is at the end of a frame. It serves others for as long as any wants something, then goes on. It
  may look whether all ranks pause at the same place (``agree``).
- **meet**: this rank is at a place where all have to be (the end of a backward, an optimizer step, a barrier). It
  serves, and stays through pauses of others, until all ranks are at the same place. If all stand still at different
  places, everybody raises, with all places named.

So a rank serves wherever it would otherwise wait: before it blocks in a collective of Lightning's, the strategy meets.
Units that are likely to be needed soon ride along with a want, so rounds are fewer than units.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from lightning_zinf.comm.channel import Channel, ChannelError

_HEADER = struct.Struct("<BHH")


class Kind(IntEnum):
    """What a rank is up to."""

    WANT = 1
    PAUSE = 2
    MEET = 3


@dataclass(frozen=True)
class Want:
    """A unit that is to be gathered.

    Attributes:
        unit: Its index.
        whole: With the low halves of the masters.
    """

    unit: int
    whole: bool = False


@dataclass(frozen=True)
class Message:
    """What one rank says in a round.

    Attributes:
        kind: What it is up to.
        wants: The units that it wants now, then those it would like along with them.
        place: Where it meets, or what it wants the units for.
        payload: What it brings to a meeting.
    """

    kind: Kind
    wants: tuple[Want, ...] = ()
    place: str = ""
    payload: bytes = b""

    def encode(self) -> bytes:
        """Return it as bytes."""
        place = self.place.encode()
        cells = [w.unit << 1 | w.whole for w in self.wants]
        return (
            _HEADER.pack(self.kind, len(cells), len(place))
            + struct.pack(f"<{len(cells)}I", *cells)
            + place
            + self.payload
        )

    @staticmethod
    def decode(data: bytes) -> Message:
        """Return the message that was encoded."""
        kind, count, length = _HEADER.unpack_from(data)
        at = _HEADER.size + 4 * count
        cells = struct.unpack_from(f"<{count}I", data, _HEADER.size)
        wants = tuple(Want(cell >> 1, bool(cell & 1)) for cell in cells)
        return Message(Kind(kind), wants, data[at : at + length].decode(), data[at + length :])


def union(messages: Sequence[Message]) -> list[Want]:
    """Return what is wanted by any rank, once each: the same list on every rank."""
    whole: dict[int, bool] = {}
    for position in range(max(len(m.wants) for m in messages)):
        for message in messages:
            if position < len(message.wants):
                want = message.wants[position]
                whole[want.unit] = whole.get(want.unit, False) or want.whole
    return [Want(unit, flag) for unit, flag in whole.items()]


class Rounds:
    """Holds rounds with the other ranks.

    Args:
        channel: The way to them.
        collect: Gathers units, together with all other ranks, which call it with the same list.
    """

    def __init__(self, channel: Channel, collect: Callable[[list[Want]], None]) -> None:
        self.channel = channel
        self.count = 0
        self._collect = collect

    def want(self, missing: Callable[[], list[Want]], ahead: Callable[[], list[Want]], reason: str) -> None:
        """Gather until nothing is missing.

        Args:
            missing: Returns what this rank still needs.
            ahead: Returns what it would like along with that.
            reason: What for, for messages.

        Raises:
            ChannelError: If other ranks do not come, fail, or cannot have this.
        """
        while wants := missing():
            listed = {w.unit for w in wants}
            more = [w for w in ahead() if w.unit not in listed]
            self._serve(self._round(Message(Kind.WANT, tuple(wants + more), reason)))

    def pause(self, place: str) -> None:
        """Serve the others while any of them wants something."""
        while self._serve(self._round(Message(Kind.PAUSE, place=place))):
            pass

    def meet(self, place: str, payload: bytes = b"") -> list[bytes]:
        """Serve until every rank is at ``place``; return what each brought, by rank.

        Raises:
            ChannelError: If ranks wait at different places.
        """
        while True:
            messages = self._round(Message(Kind.MEET, (), place, payload))
            if self._serve(messages) or any(m.kind is Kind.PAUSE for m in messages):
                continue
            if any(m.place != place for m in messages):
                said = "; ".join(f"rank {rank} is at {m.place}" for rank, m in enumerate(messages))
                reason = (
                    f"the ranks wait for each other at different places: {said}. They must have the same number of "
                    "training batches, and reach the same optimizer steps, collectives and barriers"
                )
                self.channel.broken = reason
                raise ChannelError(reason)
            return [m.payload for m in messages]

    def agree(self, place: str, payload: bytes = b"") -> list[bytes] | None:
        """Serve the others while any of them wants something; then see whether all ranks are at ``place`` by now.

        Returns:
            What each rank brought, by rank, or None if some are elsewhere. None is waited for then.
        """
        while True:
            messages = self._round(Message(Kind.PAUSE, (), place, payload))
            if self._serve(messages):
                continue
            together = all(m.kind is Kind.PAUSE and m.place == place for m in messages)
            return [m.payload for m in messages] if together else None

    def _round(self, message: Message) -> list[Message]:
        self.count += 1
        verb = "wants" if message.kind is Kind.WANT else "is at"
        return [Message.decode(m) for m in self.channel.exchange(message.encode(), f"{verb} {message.place}")]

    def _serve(self, messages: Sequence[Message]) -> bool:
        wanted = union(messages)
        if wanted:
            self._collect(wanted)
        return bool(wanted)
