"""What is left of a network's addresses."""

from __future__ import annotations

import pytest

from kvik.conf.network import parse_network
from kvik.network.address_pool import exhausted, free_addresses
from kvik.network.dnsmasq import LeaseEntry

NET = "<network><name>n</name><bridge name='br'/>{}</network>"
IP = "<ip address='10.0.0.1' prefix='24'><dhcp>{}</dhcp></ip>"
SIX = "<ip family='ipv6' address='fd00::1' prefix='64'><dhcp><range start='fd00::2' end='fd00::3'/></dhcp></ip>"


def lease(address: str) -> LeaseEntry:
    return LeaseEntry("br", 0, address, 24)


@pytest.mark.parametrize(
    ("ip", "lent", "free"),
    [
        ("", [], None),
        ("<ip address='10.0.0.1' prefix='24'/>", [], None),
        (IP.format("<host mac='52:54:00:00:00:01' ip='10.0.0.9'/>"), [], None),  # for those it knows alone
        (SIX, [], None),
        (IP.format("<range start='10.0.0.2' end='10.0.0.4'/>"), [], (3, 3)),
        (IP.format("<range start='10.0.0.1' end='10.0.0.4'/>"), [], (3, 4)),  # the gateway's own is not lent
        (IP.format("<range start='10.0.0.2' end='10.0.0.4'/>"), ["10.0.0.2", "10.0.0.9", "fd00::2"], (2, 3)),
        (
            IP.format(
                "<range start='10.0.0.2' end='10.0.0.3'/><range start='10.0.0.8' end='10.0.0.8'/>"
                "<host mac='52:54:00:00:00:01' ip='10.0.0.8'/><host mac='52:54:00:00:00:02' ip='10.0.0.77'/>"
            ),
            ["10.0.0.2", "10.0.0.3", "10.0.0.8"],
            (0, 3),
        ),
    ],
)  # fmt: skip
def test_addresses_that_are_lent_reserved_or_its_own_are_not_free(
    ip: str, lent: list[str], free: tuple[int, int] | None
) -> None:
    document, leases = parse_network(NET.format(ip)), [lease(address) for address in lent]
    assert free_addresses(document, leases) == free
    assert bool(exhausted(document, leases)) == (free is not None and free[0] == 0)
