"""How long a live disk-only snapshot holds a guest's requests up, and how long the whole command takes: kvik beside the
same by hand over QMP (qemu-img create, add-fd, blockdev-add, transaction), which is what virsh has libvirtd do.

    python3 benchmarks/snapshot.py [--rounds 10] [--disks 2]

One QEMU under software emulation, an idle guest, images of 64 MiB. The two take turns in one run. Target: < 50 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests/functional/faults")]

from fault_harness import Host, disk_xml  # noqa: E402
from fault_harness import host as new_host  # noqa: E402

from kvik.client import snapshot  # noqa: E402
from kvik.image.create import create  # noqa: E402

TARGET = 50.0  # ms
DISK_ONLY = 1 << 4


def by_kvik(host: Host, name: str) -> tuple[float, float]:
    """(ms that requests were held up at most, as kvik says; ms of the whole call)"""
    domain = host.connection.domain("m")
    began = time.monotonic()
    taken = snapshot.create(domain, f"<domainsnapshot><name>{name}</name></domainsnapshot>", DISK_ONLY)
    whole = time.monotonic() - began
    element = ElementTree.fromstring(taken.xml()).find("{urn:kvik:1}taken")
    assert element is not None
    return int(element.get("pause", "0")) / 1000, whole * 1000


def by_hand(host: Host, number: int, nodes: list[str]) -> tuple[float, float]:
    """The same by commands of one's own; `nodes`: what each disk writes to now."""
    domain = host.connection.domain("m")

    def qmp(command: str, **arguments: object) -> object:
        text = json.dumps({"execute": command, "arguments": arguments})
        answer = json.loads(domain.monitor_command(text))
        assert "error" not in answer, answer
        return answer["return"]

    began = time.monotonic()
    actions = []
    for disk, node in enumerate(nodes):
        path, name = host.root / f"h{disk}.{number}", f"hand-{disk}-{number}"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
        file = {"driver": "file", "filename": str(path)}
        qmp("blockdev-add", driver="qcow2", file=file, backing=None, **{"node-name": name})
        actions.append({"type": "blockdev-snapshot", "data": {"node": node, "overlay": name}})
        nodes[disk] = name
    asked = time.monotonic()
    qmp("transaction", actions=actions)
    end = time.monotonic()
    return (end - asked) * 1000, (end - began) * 1000


def tops(host: Host) -> list[str]:
    answer = json.loads(host.connection.domain("m").monitor_command('{"execute": "query-block"}'))
    found = [(item["qdev"], item["inserted"]["node-name"]) for item in answer["return"] if item.get("inserted")]
    return [node for _, node in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--disks", type=int, default=2)
    options = parser.parse_args()
    figures: dict[str, list[tuple[float, float]]] = {"kvik": [], "by hand": []}
    with new_host() as ours, new_host() as theirs:
        for host in (ours, theirs):
            host.start()
            paths = [host.root / f"d{number}.qcow2" for number in range(options.disks)]
            for path in paths:
                create(str(path), "qcow2", 64 << 20)
            host.define(
                "m", "".join(disk_xml(path, f"vd{chr(97 + n)}", format="qcow2") for n, path in enumerate(paths))
            )
            host.connection.domain("m").start()
        nodes = tops(theirs)
        for number in range(options.rounds):
            figures["kvik"].append(by_kvik(ours, f"s{number}"))
            figures["by hand"].append(by_hand(theirs, number, nodes))
    for name, rows in figures.items():
        held, whole = zip(*rows, strict=True)
        print(
            f"{name:<8} requests held up: median {statistics.median(held):6.2f} ms, worst {max(held):6.2f} ms; "
            f"whole: median {statistics.median(whole):6.1f} ms"
        )
    worst = max(held for held, _ in figures["kvik"])
    print(f"target: below {TARGET:g} ms: {'met' if worst < TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
