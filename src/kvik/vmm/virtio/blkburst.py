"""A disk's usual requests, many in one function: what Linux, the BSDs and Windows write nearly all the time.

Usual is: a split ring, a table of three descriptors (header, one piece of data, status), all in one region of RAM, a
read that the page cache holds or a write into it. Of such a request this function reads the same values, once each,
and checks the same things, as `SplitQueue.pop` and `Blk._begin` do, but makes neither a `Chain` nor a call for it:
that is two thirds of what a request costs. Whatever else it meets it leaves in the ring, where `pop` finds it next.
"""

from __future__ import annotations

import os
import time
from struct import Struct, unpack_from

from kvik.vmm.backends.request import READ, WRITE
from kvik.vmm.virtio.queue import DESC_INDIRECT, DESC_NEXT, DESC_WRITE
from kvik.vmm.virtio.split import SplitQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.backends.block_stats import BlockStats
    from kvik.vmm.virtio.queue import Queue

__all__ = ["serve"]

SECTOR = 512
T_IN, T_OUT = 0, 1  # VIRTIO_BLK_T_*, 5.2.6
HEADER_SIZE = 16
BATCH_BYTES = 256 << 10  # copied here before the driver sees the first: it can go on with those meanwhile
HAND_OVER = 512 << 10  # bytes of a request whose copy another thread makes, if more requests wait
REQUEST_COST = 4096  # what a request costs beside its copy, in bytes copied

# A descriptor (2.7.5) as two words: addr; len, flags, next.
_LENGTH, _FLAGS, _NEXT = 0xFFFFFFFF, 32, 48
_BELOW_NEXT = (1 << _NEXT) - 1
_TABLE = 3 * 16 | DESC_INDIRECT << _FLAGS  # in the ring
_HEADER = HEADER_SIZE | DESC_NEXT << _FLAGS | 1 << _NEXT
_READ, _WRITE = (DESC_NEXT | DESC_WRITE) | 2 << 16, DESC_NEXT | 2 << 16  # of the first piece of data: flags, next
_STATUS = 1 | DESC_WRITE << _FLAGS

_descriptor = Struct("<QQ").unpack_from
_table = Struct("<6Q").unpack_from
_header = Struct("<I4xQ").unpack_from  # type, sector
_clock = time.monotonic_ns


def serve(queue: Queue, image: BlockImage, stats: BlockStats, limit: int, *, write_through: bool) -> int:
    """Answers up to `limit` requests from the ring's front, as long as they are usual ones; how many. The driver sees
    all of them at once; `queue.flush` then tells it."""
    mapped = image.mapped
    if not isinstance(queue, SplitQueue) or not (image.plain or mapped) or queue.memory.dirty_log is not None:
        return 0
    last, avail, size = queue._next_avail, queue._avail, queue.size
    ahead = (avail[1] - last) & 0xFFFF
    most = queue._table_limit  # bytes of a table
    if not ahead or ahead > size or most < 48 or queue.in_order or queue.again:
        return 0
    reads, writes = image.may_read_now, image.inline_write_limit if not write_through else 0
    if not (reads or writes):
        return 0
    start = last & queue._mask
    desc, ring, used, mask = queue._desc, queue._used_ring, queue._next_used, size - 1
    ram, base, room = queue._ram, queue._base, queue._end - queue._base
    fd, flags, image_size = image.fd, image.read_flags, image.size
    preadv, pwritev = os.preadv, os.pwritev
    done = hits = read = written = highest = copied = 0
    began = _clock()
    for head in avail[2 + start : 2 + min(start + ahead, start + limit, size)].tolist():
        if head >= size:
            break
        table, what = _descriptor(desc, head << 4)
        table -= base
        what &= _BELOW_NEXT
        if what == _TABLE and 0 <= table <= room - 48:
            header, header_what, data, what, status, status_what = _table(ram, table)  # copied here, once
            data -= base
            length = what & _LENGTH
            if not 0 <= data <= room - length:
                break
            buffers = [ram[data : data + length]]
            what >>= _FLAGS
        elif what >> _FLAGS == DESC_INDIRECT and 48 < (count := what & _LENGTH) <= most and not count & 15:
            if not 0 <= table <= room - count:
                break
            words = unpack_from(f"<{count >> 3}Q", ram, table)  # copied here, once
            header, header_what, status, status_what = *words[:2], *words[-2:]
            what = words[3] >> _FLAGS
            if done + 1 < ahead and (words[3] & _LENGTH) * ((count >> 4) - 2) >= HAND_OVER:
                break  # as below, most likely
            buffers = _pieces(ram, base, words, what)
            length = sum(map(len, buffers))
        else:
            break
        header -= base
        status -= base
        if (
            header_what != _HEADER
            or status_what & _BELOW_NEXT != _STATUS
            or not 0 <= header <= room - HEADER_SIZE
            or not 0 <= status < room
            or not length
            or length % SECTOR
        ):
            break
        kind, sector = _header(ram, header)
        offset = sector * SECTOR
        if offset + length > image_size:
            break
        if length >= HAND_OVER and (done + 1 < ahead or (kind == T_OUT and image.in_flight)):
            break
        try:
            if kind == T_IN and what == _READ and reads:
                place = offset
                if mapped:
                    fd, place = image.place(offset, length)
                if place < 0 or preadv(fd, buffers, place, flags) != length:
                    break
                hits += 1
                read += length
                answer = length + 1
            elif kind == T_OUT and what == _WRITE and length <= writes:
                place = offset
                if mapped:
                    fd, place = image.place_to_write(offset, length)
                if place < 0 or pwritev(fd, buffers, place) != length:
                    break
                written += length
                highest = max(highest, offset + length)
                answer = 1
            else:
                break
        except OSError:
            break  # not cached, or worse: the long way, from its beginning
        ram[status] = 0  # VIRTIO_BLK_S_OK
        slot = (used + done & mask) << 1
        ring[slot] = head
        ring[slot + 1] = answer
        done += 1
        copied += length + REQUEST_COST
        if copied >= BATCH_BYTES:
            break
    if done:
        queue.show(done)
        if hits:
            image.hit()
            stats.burst(READ, hits, read, 0, began)
        if written:
            stats.burst(WRITE, done - hits, written, highest, began)
    return done


def _pieces(ram: memoryview, base: int, words: tuple[int, ...], what: int) -> list[memoryview]:
    """The data of a table with several pieces; empty if one of them is not usual. `what`: of the first one."""
    places, shapes = words[2:-2:2], words[3:-2:2]
    size, room = shapes[0] & _LENGTH, len(ram)
    expected = size | what << _FLAGS
    if shapes == tuple(range(expected, expected + (len(shapes) << _NEXT), 1 << _NEXT)):  # of one size: pages, mostly
        if not size or min(places) < base or max(places) - base > room - size:
            return []
        return [ram[data - base : data - base + size] for data in places]
    pieces: list[memoryview] = []
    expected -= size
    for data, shape in zip(places, shapes, strict=True):
        size = shape ^ expected  # flags and next are as they shall be when only the length is left
        data -= base
        if not 0 < size <= _LENGTH or not 0 <= data <= room - size:
            return []
        pieces.append(ram[data : data + size])
        expected += 1 << _NEXT
    return pieces
