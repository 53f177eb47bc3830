"""Requests to the kernel's network beside the programs that make the same: ip, bridge, nft. Needs root.

    PYTHONPATH=src python benchmarks/host_network.py [--rounds N]

Runs in a network namespace of its own.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import time
from collections.abc import Callable

from report import Report

from kvik.host import nftables
from kvik.host.bridge import bridge_ports, create_bridge, read_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.route import routes

PORTS = 50
TABLE = {"family": "ip", "name": "t"}


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds, each round by itself."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(1e6 * (time.perf_counter() - start))
    return found


def program(*words: str) -> Callable[[], object]:
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def measure(rounds: int) -> Report:
    report = Report(f"requests to the kernel's network, {rounds} rounds, medians")
    with Netlink() as netlink:
        bridge = create_bridge(netlink, "br0", up=True)
        for number in range(PORTS):
            link = netlink.add_veth(f"v{number}", f"w{number}", up=True)
            netlink.set_link(link.index, master=bridge.index)

        def beside(what: str, ours: Callable[[], object], *words: str, times: float = 5, rounds: int = rounds) -> None:
            report.faster(what, timed(ours, rounds), timed(program(*words), rounds), "us", times)

        beside("one link", lambda: netlink.link("br0"), "ip", "-d", "link", "show", "br0")
        beside("one bridge", lambda: read_bridge(netlink, "br0"), "ip", "-d", "link", "show", "br0")
        ours = timed(lambda: bridge_ports(netlink, bridge.index), rounds)
        report.within(f"{PORTS} ports", ours, timed(program("bridge", "-d", "-s", "link"), rounds), "us", 3)
        beside("routes", lambda: routes(netlink, family=socket.AF_INET), "ip", "-4", "route")
        few = max(rounds // 5, 3)  # the kernel waits for grace periods here
        made: list[float] = []
        deleted: list[float] = []
        theirs_made: list[float] = []
        theirs_deleted: list[float] = []
        for _ in range(few):
            made += timed(lambda: create_bridge(netlink, "br1", stp=True, forward_delay=0, up=True), 1)
            deleted += timed(lambda: netlink.delete_link(netlink.link("br1").index), 1)
            words = ["ip", "link", "add", "br1", "up", "type", "bridge", "stp_state", "1", "forward_delay", "0"]
            theirs_made += timed(program(*words), 1)
            theirs_deleted += timed(program("ip", "link", "delete", "br1"), 1)
        report.within("bridge made", made, theirs_made, "us", 1)
        report.within("bridge deleted", deleted, theirs_deleted, "us", 1.2)
        beside("tables listed", lambda: nftables.run([{"list": {"tables": None}}]), "nft", "-j", "list", "tables")
        change = [{"add": {"table": TABLE}}, {"delete": {"table": TABLE}}]
        beside("table made and deleted", lambda: nftables.run(change), "nft", "add table t; delete table t", times=1)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    with Namespace() as namespace:
        namespace.run(lambda: measure(rounds)).show()


if __name__ == "__main__":
    main()
