"""userfaultfd as post-copy uses it: who fills pages, and what the kernel may not do meanwhile."""

from __future__ import annotations

import ctypes
import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.errors import HostError
from kvik.vmm.layout import MIB, PAGE
from kvik.vmm.memory import GuestMemory, HostMemory, Region
from kvik.vmm.state.helper import end_helper, fork_helper
from kvik.vmm.state.userfaultfd import Userfaultfd

MADV_COLLAPSE, MADV_HUGEPAGE = 25, 14
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    try:
        one = Userfaultfd()
    except HostError as error:
        pytest.skip(str(error))
    yield one
    one.close()


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    memory = GuestMemory.allocate(4 * MIB, HostMemory(shared=request.param))
    yield memory.regions[0]
    memory.close()


PATTERN = ctypes.create_string_buffer(b"\x5a" * PAGE, PAGE)


def test_another_process_fills_what_is_touched(uffd: Userfaultfd, region: Region) -> None:
    uffd.register(region.address, 2 * MIB)

    def serve() -> None:
        while True:
            select.select([uffd.fd], [], [])
            for address in uffd.faults():
                if address < region.address + MIB:
                    uffd.copy(address, ctypes.addressof(PATTERN), PAGE)
                else:
                    uffd.zero(address, PAGE)

    pid, pidfd = fork_helper(serve, [uffd.fd])
    try:
        assert bytes(region.view[5 * PAGE + 100 : 5 * PAGE + 104]) == b"\x5a" * 4
        region.view[MIB + 7] = 1
        assert bytes(region.view[MIB : MIB + 8]) == bytes(7) + b"\1"
        assert not any(region.view[3 * MIB : 3 * MIB + PAGE])  # not watched
        # The kernel's own faults, as KVM's are.
        with Path("/dev/zero").open("rb", buffering=0) as zero:
            assert zero.readinto(region.view[9 * PAGE : 9 * PAGE + 8]) == 8
        assert bytes(region.view[9 * PAGE : 9 * PAGE + 9]) == bytes(8) + b"\x5a"
    finally:
        end_helper(pid, pidfd)
        uffd.unregister(region.address, 2 * MIB)


def test_a_page_that_is_there_is_an_error_unless_it_may_be(uffd: Userfaultfd, region: Region) -> None:
    uffd.register(region.address, 2 * MIB)
    source = ctypes.addressof(PATTERN)
    uffd.copy(region.address, source, PAGE)
    for put in (lambda again: uffd.copy(region.address, source, PAGE, again=again),
                lambda again: uffd.zero(region.address, PAGE, again=again)):  # fmt: skip
        with pytest.raises(HostError) as caught:
            put(False)
        assert caught.value.errno == errno.EEXIST
        put(True)
    assert region.view[0] == 0x5A
    uffd.unregister(region.address, 2 * MIB)


def _drop(region: Region) -> None:
    assert _libc.madvise(region.address + MIB, MIB, 4) == 0  # MADV_DONTNEED: the second half of a huge page


def _collapse(region: Region) -> bool:
    return _libc.madvise(region.address, 2 * MIB, MADV_COLLAPSE) == 0


def test_what_is_dropped_stays_missing_only_where_it_was_watched_before(uffd: Userfaultfd) -> None:
    """The reason for the order in `Postcopy.begin`: khugepaged, here made to, fills gaps with zeroes."""
    with_order: list[bool] = []
    for watched_first in (False, True):
        memory = GuestMemory.allocate(4 * MIB)
        region = memory.regions[0]
        _libc.madvise(region.address, region.size, MADV_HUGEPAGE)
        region.view[:] = b"\1" * region.size
        if watched_first:
            uffd.register(region.address, 2 * MIB)
        _drop(region)
        collapsed = _collapse(region)
        if not watched_first:
            if not collapsed:
                memory.close()
                pytest.skip(f"this kernel collapses nothing on demand: {os.strerror(ctypes.get_errno())}")
            uffd.register(region.address, 2 * MIB)
        try:
            uffd.copy(region.address + MIB, ctypes.addressof(PATTERN), PAGE)
            with_order.append(True)
        except HostError as error:
            assert error.errno == errno.EEXIST
            with_order.append(False)
        uffd.unregister(region.address, 2 * MIB)
        memory.close()
    assert with_order == [False, True]
