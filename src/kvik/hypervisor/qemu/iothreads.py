"""I/O threads of a running QEMU: objects `iothreadN`, and the Linux threads behind them.

QEMU bounds the pool of each (the threads that do blocking I/O for it) from 7.1 on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kvik.conf import iothreads as documents
from kvik.conf.cpuset import parse_cpuset
from kvik.conf.tuning import IoThread
from kvik.errors import HypervisorError, InvalidArgument
from kvik.host.affinity import affinity, set_affinity
from kvik.hypervisor.qemu.argv.build import iothread_object

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["QemuIoThreads", "pin_listed"]

_PREFIX = "iothread"


class QemuIoThreads:
    """See `hypervisor.driver.IoThreads`."""

    def __init__(self, machine: QemuMachine) -> None:
        self._machine = machine

    async def threads(self) -> dict[int, int]:
        """Number -> Linux's thread id."""
        reply = await self._machine.execute("query-iothreads")
        if not isinstance(reply, list):
            raise HypervisorError(f"{self._machine.name}: the reply to query-iothreads is no list")
        found: dict[int, int] = {}
        for item in reply:
            name, thread = (item.get("id"), item.get("thread-id")) if isinstance(item, dict) else (None, None)
            number = name.removeprefix(_PREFIX) if isinstance(name, str) else ""
            # One that another tool made under a name of its own is not the document's.
            if number.isascii() and number.isdecimal() and len(number) < 11 and isinstance(thread, int):
                found[int(number)] = thread
        return found

    async def running(self) -> dict[int, frozenset[int]]:
        return {number: affinity(thread) for number, thread in sorted((await self.threads()).items())}

    async def add(self, thread: IoThread) -> None:
        arguments = iothread_object(thread, self._machine.capabilities)
        await self._machine.execute("object-add", {key: item for key, item in arguments.items() if item is not None})

    async def delete(self, number: int) -> None:
        await self._machine.execute("object-del", {"id": f"{_PREFIX}{number}"})

    async def change(self, number: int, values: Mapping[str, int]) -> None:
        """Each when QEMU takes it: of a pool's limits first the one that makes it wider."""
        names = sorted(values)
        if {"thread_pool_min", "thread_pool_max"} <= set(names):
            least = await self._get(number, "thread-pool-max")
            if values["thread_pool_min"] > least:
                names.remove("thread_pool_max")
                names.insert(0, "thread_pool_max")
            else:
                names.remove("thread_pool_min")
                names.insert(0, "thread_pool_min")
        for name in names:
            place = {"path": f"/objects/{_PREFIX}{number}", "property": name.replace("_", "-")}
            await self._machine.execute("qom-set", place | {"value": values[name]})

    async def _get(self, number: int, name: str) -> int:
        place = {"path": f"/objects/{_PREFIX}{number}", "property": name}
        value = await self._machine.execute("qom-get", place)
        if not isinstance(value, int):
            raise HypervisorError(f"{self._machine.name}: the reply to qom-get of {name} is no number")
        return value

    async def pin(self, number: int, cpus: Iterable[int]) -> None:
        thread = (await self.threads()).get(number)
        if thread is None:
            raise InvalidArgument(f"machine {self._machine.name} has no I/O thread {number}")
        set_affinity(thread, cpus)


async def pin_listed(machine: QemuMachine) -> None:
    """At the start: those that the document binds to CPUs of the host. Raises `HostError` for CPUs there are not."""
    for number, cpuset in documents.pins(machine.domain).items():
        await machine.iothreads.pin(number, parse_cpuset(cpuset))
