"""Counters of a machine: as a dictionary, and as Prometheus text on a Unix socket (`--metrics unix:PATH`).

A counter only grows while the process lives. Scraping costs the vCPUs nothing: the numbers lie there anyway.
Reference: Prometheus' text exposition format 0.0.4.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

from kvik.errors import HostError, InvalidArgument
from kvik.kvm.constants import ExitReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.machine import Machine
    from kvik.vmm.vcpu import VcpuThread

__all__ = ["MetricsServer", "exits", "machine_figures", "prometheus", "snapshot"]

MAX_CLIENTS = 8
_STARTED = time.monotonic()


def exits(vcpu: VcpuThread) -> dict[str, int]:
    """Exits to user mode by kind, those that happened, and their sum."""
    kinds = {ExitReason.name_of(reason).lower(): count for reason, count in enumerate(vcpu.exits) if count}
    return {"exits": sum(vcpu.exits)} | kinds


def machine_figures(machine: Machine) -> dict[str, int]:
    """Counters of the machine as a whole."""
    return {
        "exits": sum(sum(vcpu.exits) for vcpu in machine.vcpus),
        "unclaimed_port_accesses": machine.ports.unclaimed,
        "unclaimed_memory_accesses": machine.mmio.unclaimed,
    }


def _resident() -> tuple[int, int]:
    """Bytes: of the process, and of it what is private and anonymous. 0 where /proc is out of reach (the sandbox)."""
    try:
        with open("/proc/self/statm", "rb") as stream:  # noqa: PTH123
            _, resident, shared, *_ = (int(field) for field in stream.read().split())
    except (OSError, ValueError):
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - shared) * page


def snapshot(machine: Machine) -> dict[str, Any]:
    """Everything there is to count."""
    resident, anonymous = _resident()
    return {
        "name": machine.config.name,
        "status": machine.status,
        "uptime_seconds": round(time.monotonic() - _STARTED, 3),
        "memory_bytes": machine.memory.size,
        "resident_bytes": resident,
        "anonymous_bytes": anonymous,
        "machine": machine_figures(machine),
        "vcpus": {str(vcpu.index): exits(vcpu) for vcpu in machine.vcpus},
        "devices": {
            name: {"kind": (device := machine.find(name)).kind} | device.stats() for name in list(machine.devices)
        },
    }


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _name(text: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter == "_") else "_" for letter in text)


def prometheus(figures: dict[str, Any]) -> str:
    """A snapshot as text. One family after the other, each with its type, as the format asks."""
    machine = _label(str(figures["name"]))
    families: dict[str, tuple[str, list[tuple[str, float]]]] = {}

    def add(family: str, kind: str, labels: str, value: float) -> None:
        families.setdefault(f"kvik_vmm_{family}", (kind, []))[1].append((f'machine="{machine}"{labels}', value))

    add("running", "gauge", "", int(figures["status"] == "running"))
    for key in ("uptime_seconds", "memory_bytes", "resident_bytes", "anonymous_bytes"):
        add(key, "gauge", "", figures[key])
    for key, value in figures["machine"].items():
        if key != "exits":
            add(f"{key}_total", "counter", "", value)
    for index, kinds in figures["vcpus"].items():
        for kind, count in kinds.items():
            if kind != "exits":
                add("exits_total", "counter", f',vcpu="{index}",kind="{_label(kind)}"', count)
    for name, counters in figures["devices"].items():
        labels = f',device="{_label(name)}",kind="{_label(str(counters["kind"]))}"'
        for key, value in counters.items():
            if isinstance(value, (int, float)):
                add(f"device_{_name(key)}", "counter", labels, int(value))
    lines = []
    for family, (kind, samples) in families.items():
        lines.append(f"# TYPE {family} {kind}")
        lines += [f"{family}{{{labels}}} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


class MetricsServer:
    """Each connection gets the figures of the moment and is closed. Whoever speaks HTTP gets them as HTTP."""

    def __init__(self, machine: Machine, place: str) -> None:
        if not place.startswith("unix:") or not place.removeprefix("unix:"):
            raise InvalidArgument(f"--metrics {place!r} is no place", remedy="write it like unix:/run/vm.metrics")
        self.machine, self.path = machine, place.removeprefix("unix:")
        self._clients: dict[int, _Client] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)  # noqa: PTH108
            before = os.umask(0o177)
            try:
                self._listener.bind(self.path)
            finally:
                os.umask(before)
            self._listener.listen(4)
        except OSError as error:
            self._listener.close()
            raise HostError(f"metrics cannot be told on {self.path}: {error.strerror or error}") from error
        self._listener.setblocking(False)
        machine.loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            self.machine.loop.hold_reader(self._listener.fileno())
            return
        if len(self._clients) >= MAX_CLIENTS:
            sock.close()
            return
        self._clients[sock.fileno()] = _Client(self, sock)

    def forget(self, fd: int) -> None:
        self._clients.pop(fd, None)

    def close(self) -> None:
        for client in list(self._clients.values()):
            client.close()
        self.machine.loop.remove_reader(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)  # noqa: PTH108


class _Client:
    """Waits a moment for a request's first line, answers, closes; never longer than `_PATIENCE` seconds."""

    _PATIENCE = 0.05  # for somebody who says nothing (nc -U): plain text
    _DEADLINE = 5.0

    def __init__(self, server: MetricsServer, sock: socket.socket) -> None:
        self._server, self._sock, self._fd = server, sock, sock.fileno()
        self._loop = server.machine.loop
        self._output = b""
        sock.setblocking(False)
        self._loop.add_reader(self._fd, self._asked)
        self._timers = [
            self._loop.call_later(self._PATIENCE, lambda: self._answer(b"")),
            self._loop.call_later(self._DEADLINE, self.close),
        ]

    def _asked(self) -> None:
        try:
            request = self._sock.recv(4096)
        except OSError:
            self.close()
            return
        self._answer(request)

    def _answer(self, request: bytes) -> None:
        self._timers[0].cancel()
        self._loop.remove_reader(self._fd)
        body = prometheus(snapshot(self._server.machine)).encode()
        if request.startswith((b"GET ", b"HEAD ")):
            head = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: %d\r\n\r\n"
            body = head % len(body) + (body if request.startswith(b"GET ") else b"")
        self._output = body
        self._loop.add_writer(self._fd, self._write)

    def _write(self) -> None:
        try:
            self._output = self._output[self._sock.send(self._output) :]
        except BlockingIOError:
            return
        except OSError:
            self._output = b""
        if not self._output:
            self.close()

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._sock.close()
        self._server.forget(self._fd)
