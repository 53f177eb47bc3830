"""Routes in the kernel, and the namespaces that keep them apart."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address, ip_network

import pytest

from kvik.errors import HostError
from kvik.host import namespace as ns
from kvik.host.netlink import Netlink
from kvik.host.route import LOCAL, add_route, routes
from netns import in_namespace, new_namespace


def a_wire(netlink: Netlink) -> int:
    index = netlink.add_veth("v0", "v1", up=True).index
    netlink.add_address(index, "192.0.2.1/24", broadcast="192.0.2.255")
    netlink.add_address(index, "2001:db8::1/64", detect_duplicates=False)
    return index


@in_namespace
def test_routes_are_added_listed_and_deleted() -> None:
    with Netlink() as netlink:
        index = a_wire(netlink)
        add_route(netlink, "198.51.100.0/24", gateway="192.0.2.9", metric=5, source="192.0.2.1")
        add_route(netlink, "203.0.113.0/24", index=index)
        add_route(netlink, "default", gateway="192.0.2.8", protocol="dhcp")
        add_route(netlink, "default", gateway="2001:db8::8")
        add_route(netlink, "10.0.0.0/8", kind="blackhole")
        found = {str(route.network): route for route in routes(netlink)}
        route = found["198.51.100.0/24"]
        assert (route.gateway, route.metric, route.index) == (ip_address("192.0.2.9"), 5, index)
        assert (route.source, route.protocol, route.kind) == (ip_address("192.0.2.1"), "static", "unicast")
        assert found["203.0.113.0/24"].gateway is None
        assert found["0.0.0.0/0"].default and found["0.0.0.0/0"].protocol == "dhcp"
        assert found["::/0"].gateway == ip_address("2001:db8::8")
        assert found["10.0.0.0/8"].kind == "blackhole"
        assert found["192.0.2.0/24"].protocol == "kernel"
        assert {route.network.version for route in routes(netlink, family=socket.AF_INET6)} == {6}
        assert ip_network("192.0.2.1/32") in {route.network for route in routes(netlink, table=LOCAL)}


@in_namespace
def test_a_route_that_exists_is_refused_or_replaced() -> None:
    with Netlink() as netlink:
        a_wire(netlink)
        add_route(netlink, "198.51.100.0/24", gateway="192.0.2.9")
        with pytest.raises(HostError) as raised:
            add_route(netlink, "198.51.100.0/24", gateway="192.0.2.8")
        assert raised.value.errno == errno.EEXIST
        add_route(netlink, "198.51.100.0/24", gateway="192.0.2.8", replace=True)
        (route,) = [each for each in routes(netlink) if each.network == ip_network("198.51.100.0/24")]
        assert route.gateway == ip_address("192.0.2.8")


@in_namespace
def test_a_table_of_its_own_is_kept_apart() -> None:
    with Netlink() as netlink:
        index = a_wire(netlink)
        add_route(netlink, "198.51.100.0/24", index=index, table=4242)
        assert [str(route.network) for route in routes(netlink, table=4242)] == ["198.51.100.0/24"]
        assert "198.51.100.0/24" not in {str(route.network) for route in routes(netlink)}


@pytest.mark.parametrize(
    "network, more",
    [
        ("192.0.2.1/24", {}),  # bits beyond the prefix
        ("192.0.2.0/33", {}),
        ("x", {}),
        ("192.0.2.0/24", {"gateway": "2001:db8::1"}),
        ("192.0.2.0/24", {"source": "y"}),
        ("192.0.2.0/24", {"kind": "odd"}),
        ("192.0.2.0/24", {"protocol": "odd"}),
    ],
)
def test_a_wrong_route_never_reaches_the_kernel(network: str, more: dict[str, str]) -> None:
    with Netlink() as netlink, pytest.raises(HostError, match="cannot add the route") as raised:
        add_route(netlink, network, **more)  # type: ignore[arg-type]  # other parameters are numbers
    assert raised.value.errno == errno.EINVAL


@in_namespace
def test_a_pair_reaches_from_one_namespace_into_another() -> None:
    with new_namespace() as world, Netlink() as netlink:
        link = netlink.add_veth("near", "far", namespace=world.fd)
        netlink.set_link(link.index, up=True)
        assert "far" not in [each.name for each in netlink.links()]

        def there() -> list[str]:
            with Netlink() as inside:
                inside.set_link(inside.link("far").index, up=True)
                return [each.name for each in inside.links()]

        assert world.run(there) == ["lo", "far"]
        assert netlink.link("near").carrier and netlink.link("near").state == "up"


@pytest.mark.root
def test_a_namespace_is_entered_only_by_its_own_thread() -> None:
    before = ns.identity()
    with new_namespace() as namespace:
        assert namespace.run(ns.identity) != before
        assert ns.run_in_namespace(namespace.fd, ns.identity) == namespace.run(ns.identity)
        assert ns.identity() == before
        with pytest.raises(ZeroDivisionError):
            namespace.run(lambda: 1 // 0)
    with pytest.raises(HostError, match="enter the network namespace"):
        ns.run_in_namespace(-1, ns.identity)
