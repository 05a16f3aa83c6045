"""Host memory: ownership, alignment, pages that come and go."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_zinf.ops import _fallback, memory
from lightning_zinf.ops.memory import host_empty, host_pinned, is_pinned, pin, release_pages, unpin

MIB = 1 << 20


@pytest.fixture(params=["compiled", "python"])
def _native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(memory, "_native", _fallback)
    elif memory._native is _fallback:
        pytest.skip("the compiled extension is missing")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.usefixtures("_native")
class TestHostEmpty:
    @pytest.mark.parametrize("huge_pages", [True, False])
    @pytest.mark.parametrize("nbytes", [1, 4096, 100_001, 5 * MIB + 3])
    def test_is_an_ordinary_aligned_tensor(self, nbytes: int, huge_pages: bool) -> None:
        tensor = host_empty(nbytes, huge_pages=huge_pages)
        assert type(tensor) is torch.Tensor
        assert tensor.dtype is torch.uint8
        assert tensor.device.type == "cpu"
        assert tensor.shape == (nbytes,)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == nbytes
        assert tensor.data_ptr() % 4096 == 0
        assert not tensor.any()
        tensor.random_(1, 255)
        assert tensor.all()

    def test_storage_use_count_is_as_of_any_tensor(self) -> None:
        def use_count(tensor: torch.Tensor) -> int:
            return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)

        ours, plain = host_empty(8192), torch.empty(8192, dtype=torch.uint8)
        assert use_count(ours) == use_count(plain)
        views = [ours[:10], ours.view(torch.float32), ours[4096:].view(torch.bfloat16)]
        assert use_count(ours) == use_count(plain) + len(views)
        del views
        assert use_count(ours) == use_count(plain)

    def test_memory_goes_with_the_last_view(self) -> None:
        before = resident_bytes()
        view = host_empty(64 * MIB).fill_(1)[32 * MIB :].view(torch.int32)
        assert resident_bytes() - before > 50 * MIB
        assert view[0] == 0x01010101
        del view
        assert resident_bytes() - before < 20 * MIB

    def test_untouched_pages_cost_nothing_and_pages_can_be_released(self) -> None:
        before = resident_bytes()
        tensor = host_empty(256 * MIB)
        assert resident_bytes() - before < 20 * MIB
        tensor[: 64 * MIB].fill_(3)
        assert resident_bytes() - before > 50 * MIB
        assert release_pages(tensor[100 : 64 * MIB]) == 64 * MIB - 4096
        assert resident_bytes() - before < 20 * MIB
        assert (tensor[:4096] == 3).all()
        assert not tensor[4096 : 8 * MIB].any()
        tensor[: 8 * MIB].fill_(5)
        assert (tensor[: 8 * MIB] == 5).all()

    def test_too_much_names_the_bytes(self) -> None:
        with pytest.raises(MemoryError, match=str(1 << 50)):
            host_empty(1 << 50)

    def test_release_refuses_foreign_memory(self) -> None:
        with pytest.raises(ValueError, match="not inside memory from host_empty"):
            release_pages(torch.empty(MIB, dtype=torch.uint8))
        with pytest.raises(ValueError, match="not contiguous"):
            release_pages(host_empty(8192).view(2, 4096).t())
        assert release_pages(host_empty(8192)[10:20]) == 0


def test_zero_and_negative() -> None:
    assert host_empty(0).shape == (0,)
    assert release_pages(host_empty(0)) == 0
    with pytest.raises(ValueError, match="must not be negative"):
        host_empty(-1)


class FakeCuda:
    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.code = 0

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        if not self.code:
            self.registered[pointer] = nbytes
        return self.code

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0

    def cudaError(self, code: int) -> SimpleNamespace:
        return SimpleNamespace(code=code)

    def cudaGetErrorString(self, error: SimpleNamespace) -> str:
        return f"message {error.code}"


def test_pin_on_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(memory, "_cudart", lambda: cuda)
    tensor = host_empty(MIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not pin(tensor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pin(tensor)
    assert pin(tensor)
    assert cuda.registered == {tensor.data_ptr(): MIB}
    assert is_pinned(tensor[5:10])
    with pytest.raises(ValueError, match="pinned"):
        release_pages(tensor)
    with pytest.raises(ValueError, match="overlap"):
        pin(tensor[:4096])
    unpin(tensor)
    unpin(tensor)
    assert cuda.registered == {}
    assert release_pages(tensor) == MIB
    cuda.code = 2
    with pytest.raises(RuntimeError, match=f"cannot pin {MIB} bytes of host memory: message 2"):
        pin(tensor)
    assert not is_pinned(tensor)


def _flags(tensor: torch.Tensor) -> list[str]:
    """What the kernel says of the mapping that a tensor begins."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split("-")[0] == f"{tensor.data_ptr():x}":
            found = True
        elif found and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping begins there")


def test_pinned_memory_is_unpinned_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(memory, "_cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(devices.append(device)))
    whole = host_pinned(3 * MIB)
    address = whole.data_ptr()
    assert cuda.registered == {address: 3 * MIB}
    assert address % 4096 == 0
    assert not whole.any()
    assert "dc" in _flags(whole)  # not in forked processes
    part = whole[MIB:].view(torch.bfloat16)
    del whole
    part.fill_(1.0)
    assert cuda.registered == {address: 3 * MIB}
    del part
    gc.collect()
    assert cuda.registered == {}
    assert devices == [3]
    again = host_pinned(3 * MIB)  # as a rule at the same address
    assert cuda.registered == {again.data_ptr(): 3 * MIB}
    assert not again.any()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not is_pinned(host_pinned(MIB))
    assert host_pinned(0).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pin_on_a_device() -> None:
    tensor = host_empty(8 * MIB)
    assert pin(tensor)
    assert tensor.is_pinned()
    assert torch.equal(tensor.fill_(3).cuda(non_blocking=True).cpu(), tensor)
    unpin(tensor)
    assert not tensor.is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_that_comes_and_goes_on_a_device() -> None:
    """The next mapping at the same address is what is copied, not the pages that were there before."""
    for value in range(1, 20):
        tensor = host_pinned(8 * MIB)
        assert tensor.is_pinned()
        assert not tensor.any()
        tensor.copy_(torch.full((8 * MIB,), value, dtype=torch.uint8, device="cuda"), non_blocking=True)
        torch.cuda.synchronize()
        assert bool((tensor == value).all())
        assert bool((tensor.cuda(non_blocking=True) == value).all())
        del tensor
