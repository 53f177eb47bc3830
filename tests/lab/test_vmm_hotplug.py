"""What comes and goes while Debian's kernel runs on kvik-vmm: processors, memory, disks and interfaces, by QMP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.harness import Lab
from lab.kernel import ensure_kernel
from lab.vmm_live import Live

pytestmark = pytest.mark.lab(deadline=240)


@pytest.fixture(scope="module")
def generic() -> Path:
    return ensure_kernel().image


WATCH_CPUS = """
(while true; do
    for cpu in /sys/devices/system/cpu/cpu*/online; do [ "$(cat $cpu)" = 0 ] && echo 1 > $cpu; done
    sleep 0.2
done) 2>/dev/null &
old=
for n in $(seq 600); do
    now=$(cat /sys/devices/system/cpu/online)
    [ "$now" != "$old" ] && echo "online <$now> nproc <$(nproc)>"
    old=$now
    sleep 0.2
done
"""


def test_processors_come_and_go_and_come_again(lab: Lab, generic: Path) -> None:
    """nproc grows and shrinks; a vCPU that left is used again; a reset keeps who is there."""
    with Live(lab, generic, WATCH_CPUS, "--cpus", "1,maximum=3") as live:
        live.until("online <0> nproc <1>")
        slots = live.do("query-hotpluggable-cpus")
        assert [("qom-path" in slot) for slot in slots] == [False, False, True]

        def plug(number: int) -> None:
            live.do("device_add", driver=slots[-1 - number]["type"], id=f"vcpu{number}", **slots[-1 - number]["props"])

        plug(1)
        live.until("online <0-1> nproc <2>")
        plug(2)
        live.until("online <0-2> nproc <3>")
        there = live.do("query-cpus-fast")
        assert [item["cpu-index"] for item in there] == [0, 1, 2]
        assert there[2]["qom-path"] == "/machine/peripheral/vcpu2" and all(item["thread-id"] for item in there)
        _, events = live.qmp({"execute": "device_del", "arguments": {"id": "vcpu1"}}, event="DEVICE_DELETED")
        assert events[-1]["data"] == {"device": "vcpu1", "path": "/machine/peripheral/vcpu1"}
        live.until("online <0,2> nproc <2>")
        assert [item["cpu-index"] for item in live.do("query-cpus-fast")] == [0, 2]
        plug(1)
        live.until("online <0,2>.*online <0-2> nproc <3>")
        live.do("system_reset")
        live.until("online <0,2>.*online <0-2>.*online <0-2> nproc <3>")  # all three from the first line of the boot
        assert "online <0> nproc <1>" not in live.console.rpartition("the guest begins")[2]


def test_a_paused_machine_takes_a_processor_too(lab: Lab, generic: Path) -> None:
    """One that was restored."""
    with Live(lab, generic, WATCH_CPUS, "--cpus", "1,maximum=2", restored=True) as live:
        live.until("online <0> nproc <1>")
        live.do("stop")
        slot = live.do("query-hotpluggable-cpus")[0]
        live.do("device_add", driver=slot["type"], id="late", **slot["props"])
        live.do("cont")
        live.until("online <0-1> nproc <2>")


MEMORY = """
total() { grep MemTotal /proc/meminfo | tr -dc 0-9; }
old=0
for n in $(seq 600); do
    now=$(total)
    [ $now -ne $old ] && echo "total <$now>"
    old=$now
    sleep 0.2
done
"""


def test_memory_grows_and_shrinks(lab: Lab, generic: Path) -> None:
    options = ("--virtio-mem", "512M,id=vmem0")
    modules = ("virtio_pci", "virtio_mem")
    setup = "memhp_default_state=online_movable"
    with Live(lab, generic, MEMORY, *options, modules=modules, append=setup, memory="512M,hotplug=1G") as live:
        before = int(live.until(r"total <(\d+)>")[1])

        def want(size: int) -> None:
            live.qmp(
                {
                    "execute": "qom-set",
                    "arguments": {"path": "/machine/peripheral/vmem0", "property": "requested-size", "value": size},
                },
                event="MEMORY_DEVICE_SIZE_CHANGE",
            )

        def reaches(good: Any) -> int:
            import time

            for _ in range(150):
                now = int(live.console.rpartition("total <")[2].partition(">")[0] or 0)
                if good(now):
                    return now
                time.sleep(0.3)
            raise AssertionError(live.console[-2000:] + live.said)

        want(256 << 20)
        reaches(lambda now: now >= before + (250 << 10))
        want(0)
        reaches(lambda now: now <= before + (8 << 10))
        assert [item["data"]["size"] for item in live.do("query-memory-devices")] == [0]


DEVICES = """
(while true; do
    [ -b /dev/vda ] && [ ! -e /tmp/read ] && cat /dev/vda | head -c 12 > /tmp/read && echo "read <$(cat /tmp/read)>"
    [ -d /sys/class/net/eth0 ] && [ ! -e /tmp/link ] && ip link set eth0 up 2>/dev/null && touch /tmp/link \\
        && echo "mac <$(cat /sys/class/net/eth0/address)>"
    sleep 0.2
done) &
old=
for n in $(seq 600); do
    now="$(ls /sys/bus/pci/devices | wc -l) $([ -b /dev/vda ] && echo disk) $([ -d /sys/class/net/eth0 ] && echo card)"
    [ "$now" != "$old" ] && echo "there <$now>"
    old=$now
    sleep 0.2
done
"""


def test_a_disk_and_a_card_come_and_go(lab: Lab, generic: Path) -> None:
    """With DEVICE_DELETED; what uses a back end keeps it; a name that is taken, or not there, is refused."""
    modules = ("virtio_pci", "virtio_blk", "virtio_net")
    with Live(lab, generic, DEVICES, modules=modules) as live:
        live.until(r"there <\d+  >")
        lab.load("tun")
        lab.sh("printf 'hello, disk!' > /tmp/late.raw; truncate -s 8M /tmp/late.raw; ip tuntap add late0 mode tap")
        node = {"driver": "raw", "node-name": "late", "file": {"driver": "file", "filename": "/dev/fdset/7"}}
        disk = {"driver": "virtio-blk-pci", "id": "disk7", "drive": "late", "serial": "late"}
        replies, _ = live.qmp(
            {"execute": "add-fd", "arguments": {"fdset-id": 7}, "fd": "/tmp/late.raw"},
            {"execute": "blockdev-add", "arguments": node},
            {"execute": "device_add", "arguments": disk},
            {"execute": "device_add", "arguments": disk},
            {"execute": "blockdev-del", "arguments": {"node-name": "late"}},
        )
        assert replies[1:3] == [{}, {}], replies
        assert "Duplicate device ID" in replies[3]["error"]["desc"] and "error" in replies[4]
        live.until(r"there <\d+ disk >.*read <hello, disk!>|read <hello, disk!>.*there <\d+ disk >")
        card = {"driver": "virtio-net-pci", "id": "net7", "netdev": "host7", "mac": "52:54:00:12:34:56"}
        replies, _ = live.qmp(
            {"execute": "getfd", "arguments": {"fdname": "tap7"}, "fd": "tap:late0"},
            {"execute": "netdev_add", "arguments": {"type": "tap", "id": "host7", "fd": "tap7"}},
            {"execute": "device_add", "arguments": card},
        )
        assert replies == [{}, {}, {}], replies
        live.until(r"there <\d+ disk card>.*mac <52:54:00:12:34:56>|mac <52:54:00:12:34:56>.*there <\d+ disk card>")
        for name, left in (("disk7", " card"), ("net7", " ")):
            _, events = live.qmp({"execute": "device_del", "arguments": {"id": name}}, event="DEVICE_DELETED")
            assert events[-1]["data"]["device"] == name
            live.until(rf"disk card>.*there <\d+ {left}>")
        replies, _ = live.qmp(
            {"execute": "device_del", "arguments": {"id": "disk7"}},
            {"execute": "blockdev-del", "arguments": {"node-name": "late"}},
            {"execute": "netdev_del", "arguments": {"id": "host7"}},
        )
        assert replies[0]["error"]["class"] == "DeviceNotFound" and replies[1:] == [{}, {}]


def test_a_guest_may_refuse_to_give_a_device_up(lab: Lab, generic: Path) -> None:
    """Without a driver for hot-plug nobody listens: nothing is taken away, and the machine goes on with its disk."""
    script = "echo alive; for n in $(seq 300); do [ -e /sys/firmware ] && head -c 12 /dev/vda && echo; sleep 0.3; done"
    lab.sh("printf 'hello, disk!' > /tmp/late.raw; truncate -s 8M /tmp/late.raw")
    options = ("--disk", "/tmp/late.raw,id=disk7")
    modules = ("virtio_pci", "virtio_blk")
    # acpiphp is built in; told not to start it takes no notice of the request.
    with Live(lab, generic, script, *options, modules=modules, append="acpiphp.disable=1") as live:
        live.until("hello, disk!")
        replies, _ = live.qmp({"execute": "device_del", "arguments": {"id": "disk7"}}, {"execute": "query-status"})
        assert replies[1]["status"] == "running"
        seen = live.console.count("hello, disk!")
        live.until(rf"(hello, disk!.*){{{seen + 5}}}")
        assert "disk7" in [item["name"] for item in live.do("qom-list", path="/machine/peripheral")]
