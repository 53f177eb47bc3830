"""The vhost-user protocol, front end's side: another process serves a device's queues (QEMU's docs/interop/vhost-user).

Messages over a Unix socket: a header of request, flags and size, a payload, and descriptors beside it. The back end
maps the guest's memory from the memfds it is given, and works on the rings by itself; this process only says where
they are. The answers are another program's: each is bounded, and each has a deadline.
"""

from __future__ import annotations

import os
import socket
import struct

from kvik.errors import HostError, InvalidArgument, OperationFailed, OperationTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.vmm.memory import GuestMemory, Region

__all__ = ["MAX_CONFIG_SIZE", "Inflight", "VhostUser"]

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE, SET_LOG_BASE = 1, 2, 3, 5, 6
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
GET_CONFIG, SET_CONFIG = 24, 25
GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32

F_LOG_ALL, F_PROTOCOL_FEATURES = 1 << 26, 1 << 30
P_MQ, P_LOG_SHMFD, P_REPLY_ACK, P_CONFIG, P_INFLIGHT = 1 << 0, 1 << 1, 1 << 3, 1 << 9, 1 << 12
VRING_F_LOG = 1

VERSION, REPLY, NEED_REPLY = 1, 1 << 2, 1 << 3
NO_FD = 1 << 8  # in the payload of SET_VRING_KICK and _CALL
MAX_REGIONS = 8  # VHOST_MEMORY_BASELINE_NREGIONS
MAX_CONFIG_SIZE = 256
MAX_PAYLOAD = 4096
DEADLINE = 5.0  # seconds for one answer

HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
STATE = struct.Struct("=II")  # index, number
ADDR = struct.Struct("=IIQQQQ")  # index, flags, descriptors, used, available, log: addresses in this process
REGION = struct.Struct("=QQQQ")  # guest address, size, address in this process, offset in the file
LOG = struct.Struct("=QQ")  # size, offset in the file
CONFIG = struct.Struct("=III")  # offset, size, flags
INFLIGHT = struct.Struct("=QQHH4x")  # bytes, offset in the file, queues, entries of each; as a C compiler pads it


class Inflight:
    """A back end's own memory, a memfd, which we hold for the one that comes after it. `place`: as it was told."""

    __slots__ = ("fd", "place")

    def __init__(self, fd: int, place: bytes) -> None:
        self.fd, self.place = fd, place


class VhostUser:
    """A connection. `HostError` when the back end is gone, `OperationFailed` when it answers nonsense."""

    def __init__(self, source: str | int) -> None:
        """`source`: the back end's socket, or the descriptor of a connected one."""
        self.name = source if isinstance(source, str) else f"descriptor {source}"
        self.features = self.protocol = 0
        self.queues = 1
        self._fds: list[int] = []  # that came with the last answer
        if isinstance(source, int):
            self.socket = socket.socket(fileno=source)
            os.set_inheritable(source, False)
        else:
            try:
                self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            except OSError as error:
                raise HostError(
                    f"cannot connect to the vhost-user back end at {source}: {error.strerror}",
                    errno=error.errno or 0,
                    remedy="a sandboxed machine cannot connect anew: restart the machine, or run it with --sandbox off",
                ) from error
        try:
            self.socket.settimeout(DEADLINE)
            if isinstance(source, str):
                self._connect(source)
            self._introduce()
        except BaseException:
            self.socket.close()
            raise

    def _connect(self, path: str) -> None:
        try:
            self.socket.connect(path)
        except OSError as error:
            raise HostError(
                f"cannot connect to the vhost-user back end at {path}: {error.strerror or error}",
                errno=error.errno or 0,
                remedy="start it first (qemu-storage-daemon, virtiofsd); it serves one machine at a time",
            ) from error

    def _introduce(self) -> None:
        self.features = self._get(GET_FEATURES)
        if self.features & F_PROTOCOL_FEATURES:
            offered = self._get(GET_PROTOCOL_FEATURES)
            self.protocol = offered & (P_MQ | P_LOG_SHMFD | P_REPLY_ACK | P_CONFIG | P_INFLIGHT)
            self._send(SET_PROTOCOL_FEATURES, _U64.pack(self.protocol))
        self._send(SET_OWNER)
        if self.protocol & P_MQ:
            self.queues = self._get(GET_QUEUE_NUM)

    # Messages ----------------------------------------------------------------------------------------------------

    def _send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, checked: bool = False) -> None:
        """`checked`: have the back end say that it took it, where it can."""
        checked = checked and bool(self.protocol & P_REPLY_ACK)
        flags = VERSION | (NEED_REPLY if checked else 0)
        message = HEADER.pack(request, flags, len(payload)) + payload
        try:
            sent = socket.send_fds(self.socket, [message], list(fds)) if fds else self.socket.send(message)
            if sent < len(message):
                self.socket.sendall(message[sent:])
        except TimeoutError as error:
            raise self._late(request) from error
        except OSError as error:
            raise self._gone(error) from error
        if checked and _U64.unpack(self._answer(request, _U64.size))[0]:
            raise OperationFailed(f"the vhost-user back end at {self.name} refused request {request}")

    def _answer(self, request: int, size: int) -> bytes:
        for fd in self._take_fds():  # that came with an answer to which none belong
            os.close(fd)
        answered, flags, length = HEADER.unpack(self._receive(request, HEADER.size))
        if answered != request or not flags & REPLY or not size <= length <= MAX_PAYLOAD:
            raise OperationFailed(
                f"the vhost-user back end at {self.name} answered request {request} with {answered}, {length} bytes"
            )
        return self._receive(request, length)

    def _receive(self, request: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part, fds, _, _ = socket.recv_fds(self.socket, size - len(data), MAX_REGIONS, socket.MSG_CMSG_CLOEXEC)
                self._fds += fds
            except TimeoutError as error:
                raise self._late(request) from error
            except OSError as error:
                raise self._gone(error) from error
            if not part:
                raise self._gone(None)
            data += part
        return data

    def _take_fds(self) -> list[int]:
        fds, self._fds = self._fds, []
        return fds

    def _gone(self, error: OSError | None) -> HostError:
        why = f": {error.strerror}" if error is not None else ""
        return HostError(f"the vhost-user back end at {self.name} is gone{why}", errno=(error and error.errno) or 0)

    def _late(self, request: int) -> OperationTimeout:
        return OperationTimeout(
            f"the vhost-user back end at {self.name} did not answer request {request} in {DEADLINE} s"
        )

    def _get(self, request: int) -> int:
        self._send(request)
        return int(_U64.unpack_from(self._answer(request, _U64.size))[0])

    @property
    def tracks(self) -> bool:
        """Whether it notes which requests it has, so that the one after it can go on with them."""
        return bool(self.protocol & P_INFLIGHT)

    @property
    def logs(self) -> bool:
        """Whether it can tell which pages it writes."""
        return bool(self.features & F_LOG_ALL and self.protocol & P_LOG_SHMFD)

    # What a device says ------------------------------------------------------------------------------------------

    def set_features(self, features: int, *, log: bool = False) -> None:
        """`log`: from now on note written pages; see `set_log`."""
        more = self.features & F_PROTOCOL_FEATURES | (F_LOG_ALL if log else 0)
        self._send(SET_FEATURES, _U64.pack(features | more), checked=True)

    def set_log(self, fd: int, size: int) -> None:
        """The memfd where it sets a bit for each page of 4 KiB that it writes. It writes to no other from here on."""
        self._send(SET_LOG_BASE, LOG.pack(size, 0), [fd])
        self._answer(SET_LOG_BASE, 0)

    def get_inflight(self, queues: int, size: int) -> Inflight:
        """New memory where it notes its requests: for queues of up to `size` entries."""
        self._send(GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, size))
        data = self._answer(GET_INFLIGHT_FD, INFLIGHT.size)
        fds = self._take_fds()
        length, offset, _, _ = INFLIGHT.unpack_from(data)
        if len(fds) != 1 or not length:
            for fd in fds:
                os.close(fd)
            raise OperationFailed(f"the vhost-user back end at {self.name} gives no memory for requests in flight")
        return Inflight(fds[0], INFLIGHT.pack(length, offset, queues, size))

    def set_inflight(self, inflight: Inflight) -> None:
        """Before its queues start: what the back end before it had taken and not answered."""
        self._send(SET_INFLIGHT_FD, inflight.place, [inflight.fd], checked=True)

    def set_memory(self, memory: GuestMemory) -> None:
        """The table of RAM. Every region needs a memfd."""
        regions: list[Region] = memory.regions
        if any(region.fd < 0 for region in regions):
            raise InvalidArgument(
                "a vhost-user device needs memory that another process can map", remedy="give the memory shared=on"
            )
        if len(regions) > MAX_REGIONS:
            raise InvalidArgument(f"vhost-user carries {MAX_REGIONS} pieces of memory, not {len(regions)}")
        table = struct.pack("=II", len(regions), 0)
        for region in regions:
            table += REGION.pack(region.start, region.size, region.address, region.fd_offset)
        self._send(SET_MEM_TABLE, table, [region.fd for region in regions], checked=True)

    def set_addresses(self, index: int, addresses: tuple[int, int, int], *, log: int = -1) -> None:
        """`addresses`: descriptors, used, available, in this process. `log`: the used ring's guest-physical address, if
        writes to it are to be logged."""
        place = (VRING_F_LOG, *addresses, log) if log >= 0 else (0, *addresses, 0)
        self._send(SET_VRING_ADDR, ADDR.pack(index, *place), checked=True)

    def start_queue(
        self, index: int, size: int, base: int, addresses: tuple[int, int, int], *, kick: int, call: int, log: int = -1
    ) -> None:
        """`base`: index of the next available entry. The rest is as for `set_addresses`."""
        self._send(SET_VRING_NUM, STATE.pack(index, size))
        self._send(SET_VRING_BASE, STATE.pack(index, base))
        self.set_addresses(index, addresses, log=log)
        self.set_call(index, call)
        self._send(SET_VRING_KICK, _U64.pack(index), [kick])
        if self.features & F_PROTOCOL_FEATURES:
            self._send(SET_VRING_ENABLE, STATE.pack(index, 1), checked=True)

    def set_call(self, index: int, fd: int) -> None:
        """The eventfd by which the back end tells that it used buffers; -1: none."""
        if fd < 0:
            self._send(SET_VRING_CALL, _U64.pack(index | NO_FD))
        else:
            self._send(SET_VRING_CALL, _U64.pack(index), [fd])

    def stop_queue(self, index: int) -> int:
        """Have the back end finish and let go of a queue: the index of the next available entry."""
        self._send(GET_VRING_BASE, STATE.pack(index, 0))
        return int(STATE.unpack_from(self._answer(GET_VRING_BASE, STATE.size))[1]) & 0xFFFF

    def get_config(self, size: int) -> bytes:
        """The first `size` bytes of the device's configuration space; what the back end lacks of them is zero."""
        if not self.protocol & P_CONFIG:
            raise OperationFailed(f"the vhost-user back end at {self.name} tells no configuration")
        self._send(GET_CONFIG, CONFIG.pack(0, size, 0) + bytes(size))
        data = self._answer(GET_CONFIG, 0)
        if len(data) < CONFIG.size:
            raise OperationFailed(f"the vhost-user back end at {self.name} has no configuration of {size} bytes")
        return data[CONFIG.size : CONFIG.size + size].ljust(size, b"\0")

    def set_config(self, offset: int, data: bytes) -> None:
        if self.protocol & P_CONFIG:
            self._send(SET_CONFIG, CONFIG.pack(offset, len(data), 0) + data, checked=True)

    def fileno(self) -> int:
        return self.socket.fileno()

    def hung_up(self) -> bool:
        """Whether the back end has closed. Nothing is expected from it unasked, so bytes count as that too."""
        try:
            self.socket.setblocking(False)
            self.socket.recv(1, socket.MSG_PEEK)
            return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.socket.settimeout(DEADLINE)

    def close(self) -> None:
        self.socket.close()
        for fd in self._take_fds():
            os.close(fd)
