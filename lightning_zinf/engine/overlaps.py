"""Parameters that share memory without being one parameter.

Note [Overlaps]
~~~~~~~~~~~~~~~
Each parameter gets memory of its own, so two that shared some would be trained apart without a word. A parameter spans
the bytes from its first to its last element. Two spans that overlap and have no gaps share memory, which takes a sweep
over sorted spans to find. With gaps, as columns of one matrix have, they may lie between each other: such clusters of
spans are looked at element by element, in a map with one byte for each.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging

_FROZEN, _LEARNS = 1, 2


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    number: int
    param: nn.Parameter
    learns: bool

    @property
    def solid(self) -> bool:
        """Whether it has no gaps: in the order of their strides, each dimension begins where those before it end."""
        reached = 1
        for stride, n in sorted(zip(self.param.stride(), self.param.shape, strict=True)):
            if n > 1 and stride != reached:
                return False
            reached *= n
        return True


def refuse_overlaps(root: nn.Module, trained: Collection[int]) -> None:
    """Raise if a trained parameter shares memory with another.

    Args:
        root: The model.
        trained: The ``id`` of each parameter that is trained.

    Raises:
        ValueError: With the names of both.
    """
    spans = [
        _span(number, param, id(param) in trained)
        for number, param in enumerate(root.parameters())
        if not isinstance(param, paging.Released) and not param.is_meta and param.numel()
    ]
    spans.sort(key=lambda s: (s.start, s.end, s.number))
    pair = _solid_pair([s for s in spans if s.solid])
    for cluster in _clusters(spans):
        pair = pair or _pair_in(cluster)
    if pair is not None:
        names = [name for name, _ in root.named_parameters()]
        first, second = sorted(pair)
        raise ValueError(
            f"parameters {names[first]!r} and {names[second]!r} share memory, which would be trained apart: tie "
            "them as one parameter (b.weight = a.weight), or give each a copy (.detach().clone())"
        )


def _span(number: int, param: nn.Parameter, learns: bool) -> _Span:
    last = sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True))
    start = param.data_ptr()
    return _Span(start, start + (last + 1) * param.element_size(), number, param, learns)


def _solid_pair(spans: Sequence[_Span]) -> tuple[int, int] | None:
    """Return the numbers of two spans without gaps that overlap, one of which learns."""
    every = learning = (0, 0)  # end and number of what reaches farthest
    for span in spans:
        end, other = every if span.learns else learning
        if span.start < end:
            return span.number, other
        every = max(every, (span.end, span.number))
        if span.learns:
            learning = max(learning, (span.end, span.number))
    return None


def _clusters(spans: Sequence[_Span]) -> Iterator[list[_Span]]:
    """Yield those that overlap in turn, where one has gaps and one learns."""
    cluster: list[_Span] = []
    end = 0
    for span in [*spans, None]:
        if span is None or span.start >= end:
            if len(cluster) > 1 and any(s.learns for s in cluster) and not all(s.solid for s in cluster):
                yield cluster
            cluster = []
        if span is not None:
            cluster.append(span)
            end = max(end, span.end)


def _pair_in(cluster: Sequence[_Span]) -> tuple[int, int] | None:
    """Return the numbers of two of a cluster that have an element in common, one of which learns."""
    base = cluster[0].start
    unit = math.gcd(*(s.start - base for s in cluster), *(s.param.element_size() for s in cluster))
    marks = torch.zeros((max(s.end for s in cluster) - base) // unit, dtype=torch.uint8)
    for number, span in enumerate(cluster):
        own = _elements(marks, span, base, unit)
        if bool((own > 0 if span.learns else own > _FROZEN).any()):
            for other in cluster[:number]:
                _elements(marks.zero_(), other, base, unit).fill_(1)
                if (span.learns or other.learns) and bool(own.any()):
                    return span.number, other.number
        own.fill_(_LEARNS if span.learns else _FROZEN)
    return None


def _elements(marks: Tensor, span: _Span, base: int, unit: int) -> Tensor:
    """Return the marks of a parameter's elements."""
    width = span.param.element_size() // unit
    pairs = [(n, stride * width) for n, stride in zip(span.param.shape, span.param.stride(), strict=True) if stride]
    return marks.as_strided(
        (*(n for n, _ in pairs), width), (*(stride for _, stride in pairs), 1), (span.start - base) // unit
    )
