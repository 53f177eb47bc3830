"""The daemon dies at every step of a live change of a machine's tap; the next one puts it where its document has it."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

from functional.network.networks import NAT, with_networks
from functional.network.test_mtu import card
from functional.network.test_networks import pytestmark, space  # noqa: F401  the marks hold here too
from functional.network.test_networks_killed import STEPS_MAX, Step
from kvik.conf.devices.interface import Interface
from kvik.host.bridge import bridge_ports, create_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.traffic import queues
from kvik.network.attachment import Attachment, resolve
from kvik.network.networks import Networks
from kvik.network.tap_changes import change_tap, put_back_tap
from kvik.network.taps import open_taps

HERE = "type='network'><source network='default'/><port isolated='yes'/><bandwidth><inbound average='700'/></bandwidth>"
THERE = "type='bridge'><source bridge='br9'/><bandwidth><outbound average='300'/></bandwidth>"
FREE = "type='network'><source network='default'/>"


def where(netlink: Netlink, name: str) -> tuple[str, bool, bool, list[str]]:
    """Its bridge, whether it is up and isolated, and what bounds it."""
    tap = netlink.link(name)
    (port,) = (
        [port for port in bridge_ports(netlink, tap.master) if port.link.index == tap.index] if tap.master else [None]
    )
    bounds = sorted({queue.kind for queue in queues(netlink, tap.index)} & {"htb", "ingress"})
    return netlink.link(tap.master).name if tap.master else "", tap.up, bool(port and port.isolated), bounds


def die_at(deadly: int, interface: Interface, before: Attachment, after: Attachment) -> bool:
    """Change it in a child that kills itself at that step; False if it came to its end before that."""
    child = os.fork()
    if child == 0:
        try:
            Step(deadly).wrap(Netlink, "change")
            change_tap(interface, before, after)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_at_any_step_of_a_change_it_is_put_back(space: Namespace, tmp_path: Path) -> None:  # noqa: F811
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        with Netlink() as netlink, ExitStack() as close:
            create_bridge(netlink, "br9", up=True)
            interface = card(HERE, None)
            home = resolve(interface, networks)
            assert home is not None
            open_taps([interface], close, {"net0": home})
            assert interface.target is not None and interface.target.dev is not None
            name, right = interface.target.dev, ("virbr0", True, True, ["htb"])
            assert where(netlink, name) == right
            for other in (THERE, FREE):  # onto another bridge; other walls and rates where it is
                target = resolve(card(other, None), networks)
                assert target is not None
                for deadly in range(1, STEPS_MAX):
                    died = die_at(deadly, interface, home, target)
                    put_back_tap(interface, home)
                    assert where(netlink, name) == right, f"step {deadly}"
                    assert put_back_tap(interface, home) is False
                    if not died:
                        break
                assert 4 < deadly < STEPS_MAX - 1
        await network.destroy()

    with_networks(space, tmp_path, turn)
