"""A port for gdb: `target remote`.

$ kvik-vmm --gdb tcp:127.0.0.1:1234 ...         (gdb) target remote :1234
$ kvik-vmm --gdb unix:/run/vm.gdb ...           (gdb) target remote /run/vm.gdb
"""

from __future__ import annotations

import contextlib
import os
import socket

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.gdb import GdbSession

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.machine import Machine

__all__ = ["GdbServer"]


class GdbServer:
    """Listens; one debugger at a time. `place` is tcp:HOST:PORT or unix:PATH. Raises `HostError`, `InvalidArgument`."""

    def __init__(self, machine: Machine, place: str) -> None:
        self.machine = machine
        self.session: GdbSession | None = None
        self._path = ""
        kind, _, rest = place.partition(":")
        host, _, port = rest.rpartition(":")
        if not rest or kind not in ("tcp", "unix") or (kind == "tcp" and not (host and port.isdecimal())):
            raise InvalidArgument(
                f"--gdb {place!r} is no place", remedy="write it like tcp:127.0.0.1:1234 or unix:PATH"
            )
        try:
            if kind == "unix":
                self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(rest)  # noqa: PTH108
                before = os.umask(0o177)
                try:
                    self._listener.bind(rest)
                finally:
                    os.umask(before)
                self._path = rest
            else:
                self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
                self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._listener.bind((host.strip("[]"), int(port)))
            self._listener.listen(1)
        except (OSError, OverflowError) as error:
            raise HostError(f"gdb cannot be waited for on {place}: {error}") from error
        self._listener.setblocking(False)
        self.address = self._listener.getsockname()
        machine.loop.add_reader(self._listener.fileno(), self._accept)
        machine.on_close.append(self.close)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            self.machine.loop.hold_reader(self._listener.fileno())
            return
        if (self.session is not None and not self.session.closed) or not self.machine.vcpus:
            sock.close()
            return
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.session = GdbSession(self.machine, sock)

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        self.machine.loop.remove_reader(self._listener.fileno())
        self._listener.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)  # noqa: PTH108
        if self.session is not None:
            self.session.close(resume=False)
