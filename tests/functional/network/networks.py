"""A network namespace with a `Networks` in it: what tests of virtual networks are written in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from kvik.host.namespace import Namespace
from kvik.network.networks import Networks
from kvik.paths import Paths

T = TypeVar("T")

NAT = """<network>
  <name>default</name>
  <forward mode='nat'/>
  <bridge name='virbr0' stp='off' delay='0'/>
  <ip address='192.168.122.1' netmask='255.255.255.0'>
    <dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp>
  </ip>
</network>"""

ISOLATED = """<network>
  <name>inside</name>
  <bridge name='virbr7'/>
  <ip address='10.7.0.1' prefix='24'/>
</network>"""


def with_networks(
    space: Namespace, root: Path, work: Callable[[Networks], Awaitable[T]], *, probing: bool = False
) -> T:
    """Open the networks kept below `root` in a namespace, call `work` with them, close them again."""

    async def turn() -> T:
        networks = Networks(Paths.system(root), probing=probing)
        await networks.open()
        try:
            return await work(networks)
        except BaseException:  # a test that fails leaves nothing behind
            for network in networks.list():
                if network.is_active:
                    await network.destroy()
            raise
        finally:
            await networks.close()

    return space.run(lambda: asyncio.run(turn()))
