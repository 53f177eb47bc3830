"""The daemon dies at every single step of a start and of a stop; the next one puts everything right."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.network.networks import NAT, with_networks
from functional.network.test_networks import links, pytestmark, tables  # noqa: F401  the marks hold here too
from kvik.host import files, nftables, tools
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.process import ProcessHandle
from kvik.network.networks import Networks
from kvik.paths import Paths

STEPS_MAX = 200


class Step:
    """Counts what is done to the host; dies before or after one of them."""

    def __init__(self, deadly: int) -> None:
        self.count, self.deadly = 0, deadly

    def wrap(self, holder: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(holder, name)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            self.count += 1
            if self.count == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(holder, name, stepped)


def die_at(root: Path, deadly: int, work: Callable[[Networks], Any]) -> bool:
    """Run `work` in a child that kills itself at step `deadly`; False if it came to its end before that."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            step = Step(deadly)
            for holder, name in (
                (Netlink, "change"), (nftables, "run"), (files, "atomic_write"), (files, "remove_file"), (tools, "run"),
                (ProcessHandle, "terminate"),
            ):  # fmt: skip
                step.wrap(holder, name)

            async def turn() -> None:
                networks = Networks(Paths.system(root))
                await networks.open()
                step.count = 0
                await work(networks)

            asyncio.run(turn())
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def servers(root: Path) -> list[str]:
    """Command lines of every dnsmasq that has a file below `root`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            if command.startswith(("/usr/sbin/dnsmasq", "dnsmasq")) and f"--conf-file={root}" in command:
                found.append(command)
    return found


def test_killed_at_any_step_of_a_start(space: Namespace, tmp_path: Path) -> None:
    async def define(networks: Networks) -> None:
        await networks.define(NAT)

    async def start(networks: Networks) -> None:
        await networks.lookup_name("default").start()

    async def put_right(networks: Networks) -> None:
        network = networks.lookup_name("default")
        if not network.is_active:
            with Netlink() as netlink:
                assert {link.name for link in netlink.links()} == {"lo"}
            assert nftables.run([{"list": {"tables": None}}]) == []
            assert servers(tmp_path) == []
            await network.start()
        await network.destroy()

    with_networks(space, tmp_path, define)
    for deadly in range(1, STEPS_MAX):
        died = space.run(lambda at=deadly: die_at(tmp_path, at, start))
        with_networks(space, tmp_path, put_right)
        assert links(space) == tables(space) == set(), f"step {deadly}"
        assert servers(tmp_path) == []
        assert not (tmp_path / "run/kvik/network/default.xml").exists()
        if not died:
            break
    assert 12 < deadly < STEPS_MAX - 1


def test_killed_at_any_step_of_a_stop(space: Namespace, tmp_path: Path) -> None:
    async def start(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()

    async def stop(networks: Networks) -> None:
        await networks.lookup_name("default").destroy()

    async def put_right(networks: Networks) -> None:
        network = networks.lookup_name("default")
        if network.is_active:
            await network.destroy()

    for deadly in range(1, STEPS_MAX):
        with_networks(space, tmp_path, start)
        died = space.run(lambda at=deadly: die_at(tmp_path, at, stop))
        with_networks(space, tmp_path, put_right)
        assert links(space) == tables(space) == set(), f"step {deadly}"
        assert servers(tmp_path) == []
        assert not (tmp_path / "run/kvik/network/default.xml").exists()
        if not died:
            break
    assert 6 < deadly < STEPS_MAX - 1
