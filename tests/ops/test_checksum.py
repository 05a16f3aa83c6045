"""The checksum against zlib's, on every instruction set, and combined from parts."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_states import ISAS, needs_extension

from lightning_zinf.ops import crc32, crc32_combine, kernels, reference


@pytest.fixture(params=[*ISAS, "reference"], scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every way there is to compute it; hypothesis wants the same for all examples."""
    before = kernels._ext
    if request.param == "reference":
        kernels._ext = None
    else:
        kernels._ext.set_isa(request.param)
    yield request.param
    kernels._ext = before
    if before is not None:
        before.set_isa(os.environ.get("ZINF_ISA") or ISAS[-1])


@given(
    content=st.binary(max_size=3000), times=st.integers(1, 40), crc=st.integers(0, 2**32 - 1), shift=st.integers(0, 70)
)
def test_it_is_zlibs(isa: str, content: bytes, times: int, crc: int, shift: int) -> None:
    view = memoryview(content * times)[shift:]
    expected = zlib.crc32(view, crc)
    assert crc32(view, crc) == expected
    assert crc32(bytes(view), crc) == expected
    assert crc32(bytearray(view), crc) == expected
    assert crc32(torch.tensor(list(view), dtype=torch.uint8), crc) == expected


@given(content=st.binary(max_size=2000), cuts=st.lists(st.integers(0, 2000), max_size=5))
def test_parts_are_combined(isa: str, content: bytes, cuts: list[int]) -> None:
    ends = [0, *sorted(min(c, len(content)) for c in cuts), len(content)]
    found, in_a_row = 0, 0
    for start, stop in itertools.pairwise(ends):
        found = crc32_combine(found, crc32(content[start:stop]), stop - start)
        in_a_row = crc32(content[start:stop], in_a_row)
    assert found == in_a_row == zlib.crc32(content)


@needs_extension
@given(first=st.integers(0, 2**32 - 1), second=st.integers(0, 2**32 - 1), nbytes=st.integers(0, 2**62))
def test_combining_is_the_reference(first: int, second: int, nbytes: int) -> None:
    assert crc32_combine(first, second, nbytes) == reference.crc32_combine(first, second, nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8])
def test_tensors_of_any_dtype_and_shape(isa: str, dtype: torch.dtype) -> None:
    tensor = torch.arange(3 * 5 * 700).view(3, 5, 700).to(dtype)
    assert crc32(tensor) == zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    assert crc32(tensor[:0], 5) == 5


def test_large_ones_from_several_threads(isa: str) -> None:
    contents = [torch.randint(0, 256, (3_000_017 + i,), dtype=torch.uint8) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(crc32, contents)) == [zlib.crc32(c.numpy().tobytes()) for c in contents]


def test_what_is_no_run_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"contiguous tensor in host memory, got strides \(1, 4\)"):
        crc32(torch.ones(4, 4).T)
    with pytest.raises(ValueError, match="on meta"):
        crc32(torch.ones(4, device="meta"))
