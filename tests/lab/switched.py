"""Machines on switches of a kernel that has everything. Each function runs inside the lab, on what `set_up` left there:

python -m lab.switched NAME [ARGUMENT ...]

Two machines of a stock kernel: m1 on QEMU, m2 on kvik-vmm. Their cards bear the names of what they are on, and a `t`
more where that is a trunk. A station, in VLAN 20 of every switch, is a network namespace.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvik.client import Connection, connect
from kvik.client.bridge import Bridges
from kvik.conf.network import parse_network
from kvik.errors import ConfigUnsupported, KvikError
from kvik.host.netlink import Netlink
from kvik.network.probe import probe

PATIENCE = 150.0  # seconds for anything: the lab is slow, and slower on a busy host
OVS = "/run/openvswitch"
NETWORKS = {
    "lan": """<bridge name='lan0' stp='off' delay='0'/>
<portgroup name='ten'><vlan><tag id='10'/></vlan></portgroup>
<portgroup name='trunk'><vlan trunk='yes'><tag id='10'/><tag id='20'/></vlan></portgroup>""",
    "ovs": """<forward mode='bridge'/><bridge name='ovs0'/><virtualport type='openvswitch'/>
<portgroup name='ten'><vlan><tag id='10'/></vlan></portgroup>
<portgroup name='trunk'><vlan trunk='yes'><tag id='20' nativeMode='untagged'/><tag id='10'/></vlan></portgroup>""",
    "fixed": "<bridge name='fixed0' stp='off' delay='0' macTableManager='libvirt'/>",
    "slow": """<bridge name='slow0' stp='off' delay='0'/><forward mode='nat'/>
<ip address='10.9.0.1' prefix='24'><dhcp><range start='10.9.0.10' end='10.9.0.99'/></dhcp></ip>""",
}
SWITCHES = ("lan", "ovs", "fixed")
VLAN = "<vlan><tag id='{}'/></vlan>"
QUEUES = "<driver name='vhost' queues='2'/>"
# Of each machine: what runs it, and of each card its network, its portgroup and what else its document says.
MACHINES: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "m1": ("qemu", [("lan", "", VLAN.format(10) + QUEUES), ("ovs", "", VLAN.format(10)), ("fixed", "", "")]),
    "m2": (
        "kvik",
        [("lan", "ten", ""), ("ovs", "ten", ""), ("fixed", "", ""), ("lan", "trunk", ""), ("ovs", "trunk", "")],
    ),
}
DOMAIN = """<domain type='kvm'><name>{name}</name><memory unit='MiB'>192</memory><vcpu>1</vcpu>
<os><type machine='{machine}'>hvm</type><kernel>{kernel}</kernel><initrd>/tmp/switched.initrd</initrd>
<cmdline>console=ttyS0 quiet panic=-1 pci=noearly</cmdline></os><features><acpi/></features>
<devices><emulator>{emulator}</emulator>
<serial type='unix'><source mode='bind' path='/tmp/{name}.serial'/></serial>{cards}</devices></domain>"""


def until(what: str, condition: Callable[[], Any]) -> Any:
    """Its value, once it is true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.1)
    return value


def said(what: str) -> None:
    """Into the share: where a lab that stood still had got to."""
    with open("/run/lab/progress", "a") as file:
        file.write(f"{time.monotonic():.1f} {what}\n")


def sh(script: str) -> str:
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def kvik(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kvik.cli.main", *words], capture_output=True, text=True, check=False, stdin=-3
    )
    assert done.returncode == 0, f"kvik {' '.join(words)}: {done.stderr}"
    return done.stdout


def mac(name: str, number: int) -> str:
    return f"52:54:00:00:0{name[1]}:0{number}"


class Guest:
    """A machine's shell, on its serial line."""

    def __init__(self, name: str) -> None:
        self.name, self.said = name, ""
        self.line = socket.socket(socket.AF_UNIX)

        def answers() -> bool:
            try:
                self.line.connect(f"/tmp/{name}.serial")
            except OSError:
                return False
            return True

        until(f"the serial line of {name}", answers)

    def _until(self, text: str) -> str:
        start, end = len(self.said), time.monotonic() + PATIENCE
        while text not in self.said[start:]:
            ready = select.select([self.line], [], [], max(end - time.monotonic(), 0))[0]
            data = self.line.recv(65536) if ready else b""
            assert data, f"{self.name} never said {text!r}:\n{self.said[-3000:]}"
            self.said += data.decode(errors="replace").replace("\r", "")
        return self.said[start:]

    def wait(self) -> None:
        """Until the shell is there, which says so once. Nothing is written before: a terminal that is being opened
        loses characters, and half a command may end the shell."""
        self._until("at your service")
        self.run("true")

    def run(self, command: str, check: bool = True) -> str:
        """What a command of one line prints."""
        token = os.urandom(4).hex()
        self.line.sendall(f"({command}); echo {token[:4]}''{token[4:]} $?\n".encode())
        out, _, code = self._until(token).rpartition(token)
        while "\n" not in code:
            code += self._until("\n")
        out = "\n".join(row for row in out.splitlines() if "--- ended" not in row)
        assert not check or code.split()[:1] == ["0"], f"{self.name}: {command}: {code}\n{out}"
        return out.strip()

    def reaches(self, address: str) -> bool:
        """Whether an answer comes, be it late: the first packets of a switch's and a machine's life are slow here."""
        return any("bytes from" in self.run(f"ping -c 2 -i 0.2 -W 4 {address}", check=False) for _ in range(3))

    def cannot_reach(self, address: str) -> bool:
        """Of an address that another reaches."""
        return "bytes from" not in self.run(f"ping -c 2 -i 0.2 -W 2 {address}", check=False)


def guests() -> list[Guest]:
    return [Guest(name) for name in MACHINES]


def at_station(command: str) -> str:
    """On the station: a network namespace with a card in VLAN 20 of every switch, 10.N.0.3."""
    return sh(f"ip netns exec station {command}")


def tap(name: str, number: int) -> str:
    """The tap of a machine's card."""
    wanted = "fe" + mac(name, number)[2:]
    with Netlink() as netlink:
        return next(link.name for link in netlink.links() if link.mac == wanted)


def started(connection: Connection, words: str) -> bool:
    """Whether it runs now. Not while all that was just set up keeps KVM from answering kvik's look at it in time."""
    try:
        connection.define(words).start()
    except ConfigUnsupported as error:
        if "did not end within" not in str(error):
            raise
        said(str(error))
        return False
    return True


def set_up(kernel: str) -> None:
    """Switches, networks and machines. The latter stay until the lab is cleared."""
    sh(
        f"""
        ip link set lo up
        cp /run/lab/switched.initrd /tmp/
        mkdir -p {OVS}
        ovsdb-tool create {OVS}/conf.db /usr/share/openvswitch/vswitch.ovsschema
        options="--detach --no-chdir --log-file={OVS}/log"
        ovsdb-server {OVS}/conf.db --remote=punix:{OVS}/db.sock --pidfile={OVS}/ovsdb-server.pid $options
        ovs-vsctl --no-wait init
        ovs-vswitchd unix:{OVS}/db.sock --pidfile={OVS}/ovs-vswitchd.pid $options
        ovs-vsctl add-br ovs0
        """
    )
    said("Open vSwitch")
    # Not by the first connection: on a busy host the lab's daemon takes longer than that waits.
    subprocess.run([sys.executable, "-m", "kvik.daemon", "--system", "--detach"], check=True)
    connection = connect("kvik:///system")
    said("daemon")
    for name, words in NETWORKS.items():
        connection.define_network(f"<network><name>{name}</name>{words}</network>").start()
    said("networks")
    for name, (vmm, cards) in MACHINES.items():
        devices = ""
        for number, (network, group, more) in enumerate(cards):
            portgroup = f" portgroup='{group}'" if group else ""
            devices += f"<interface type='network'><source network='{network}'{portgroup}/>{more}<model type='virtio'/>"
            devices += f"<mac address='{mac(name, number)}'/></interface>"
        emulator = "kvik-vmm" if vmm == "kvik" else "/usr/bin/qemu-system-x86_64"
        machine = "kvik" if vmm == "kvik" else "q35"
        words = DOMAIN.format(name=name, machine=machine, emulator=emulator, kernel=kernel, cards=devices)
        until(f"{name} is started", lambda words=words: started(connection, words))
        guest = Guest(name)
        said(name + " started")
        guest.wait()  # one after the other: machines that boot together crawl in the lab
        # Linux answers ARP for any of its addresses on any of its cards: whoever asks in one VLAN would learn, for half
        # a minute, the card that is in another one.
        guest.run("echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore")
        for number, (network, group, _) in enumerate(MACHINES[guest.name][1]):
            new = network + ("t" if group == "trunk" else "")
            address = mac(guest.name, number)
            old = guest.run(f"cd /sys/class/net; grep -l {address} */address | cut -d/ -f1")
            guest.run(f"ip link set {old} name {new}; ip link set {new} up")
        last = guest.name[1]
        for number, network in enumerate(SWITCHES):
            guest.run(f"ip addr add 10.{number}.0.{last}/24 dev {network}")
    sh("ip netns add station")
    for number, network in enumerate(SWITCHES):
        sh(
            f"""
            ip link add {network}20 type veth peer name {network} netns station
            ip link set {network}20 up
            ip -n station link set {network} up
            ip -n station addr add 10.{number}.0.3/24 dev {network}
            """
        )
    kvik("bridge", "addif", "lan0", "lan20")
    kvik("bridge", "vlan", "lan0", "add", "lan20", "20", "--pvid", "--untagged")
    kvik("bridge", "vlan", "lan0", "del", "lan20", "1")
    kvik("bridge", "addif", "fixed0", "fixed20")
    sh("ovs-vsctl add-port ovs0 ovs20 tag=20")
    said("station")


def vlans_of(port: str) -> list[tuple[int, int, bool, bool]]:
    """As `kvik bridge vlan` shows them."""
    rows = json.loads(kvik("bridge", "vlan", "lan0", "--json"))
    return [(row["first"], row["last"], row["pvid"], row["untagged"]) for row in rows if row["port"] == port]


def vlans() -> None:
    """Machines of one VLAN reach each other and no other, whatever said it: interface, portgroup or `kvik bridge`."""
    one, two = guests()
    shown, ports = Bridges(connect("kvik:///system")).show("lan0")
    assert shown.vlan_filtering, shown
    assert {tap("m1", 0), tap("m2", 0), tap("m2", 3)} <= {port.name for port in ports}
    assert one.reaches("10.0.0.2"), "portgroup and interface of VLAN 10"
    assert one.cannot_reach("10.0.0.3"), "VLAN 10 and 20"
    # The trunk has frames of both, with their tags.
    for tag in (10, 20):
        two.run(f"ip link add link lant name lant.{tag} type vlan id {tag}; ip link set lant.{tag} up")
        two.run(f"ip addr add 10.{tag}.0.2/24 dev lant.{tag}")
        one.run(f"ip addr add 10.{tag}.0.1/24 dev lan")
    at_station("ip addr add 10.20.0.3/24 dev lan")
    assert two.reaches("10.20.0.3") and one.reaches("10.10.0.2") and one.cannot_reach("10.20.0.2")
    assert vlans_of(tap("m2", 3)) == [(10, 10, False, False), (20, 20, False, False)]
    # A machine changes its VLAN while it runs.
    mine = tap("m1", 0)
    assert vlans_of(mine) == [(10, 10, True, True)]
    kvik("bridge", "vlan", "lan0", "add", mine, "20", "--pvid", "--untagged")
    kvik("bridge", "vlan", "lan0", "del", mine, "10")
    assert vlans_of(mine) == [(20, 20, True, True)]
    assert one.reaches("10.0.0.3") and one.reaches("10.20.0.2")
    assert one.cannot_reach("10.0.0.2") and one.cannot_reach("10.10.0.2")
    # The host itself is in a VLAN when its bridge is.
    kvik("bridge", "vlan", "lan0", "add", "lan0", "20")
    sh("ip link add link lan0 name lan0.20 type vlan id 20; ip addr add 10.0.0.9/24 dev lan0.20")
    sh("ip link set lan0.20 up")
    assert one.reaches("10.0.0.9") and two.cannot_reach("10.0.0.9")
    sh("ip link del lan0.20")
    # The network is stopped and started: its bridge is a new one, and the walls are those of the documents.
    network = connect("kvik:///system").network("lan")
    network.destroy()
    network.start()
    until("the machines are on it again", lambda: tap_master("m2", 3) == "lan0" and tap_master("m1", 0) == "lan0")
    assert vlans_of(mine) == [(10, 10, True, True)]
    kvik("bridge", "addif", "lan0", "lan20")
    kvik("bridge", "vlan", "lan0", "add", "lan20", "20", "--pvid", "--untagged")
    kvik("bridge", "vlan", "lan0", "del", "lan20", "1")
    assert one.reaches("10.0.0.2") and two.reaches("10.20.0.3") and one.cannot_reach("10.0.0.3")


def tap_master(name: str, number: int) -> str:
    with Netlink() as netlink:
        link = netlink.link(tap(name, number))
        return netlink.link(link.master).name if link.master else ""


def walls() -> None:
    """A bridge that is not kvik's is left as it is: no VLANs on it until its owner has it filter."""
    connection = connect("kvik:///system")
    domain = connection.lookup_name("m1")
    card = (
        "<interface type='bridge'><source bridge='other0'/><mac address='52:54:00:00:01:77'/>"
        "<model type='virtio'/><vlan><tag id='30'/></vlan></interface>"
    )
    kvik("bridge", "add", "other0")
    before = sh("ls /sys/class/net")
    try:
        domain.attach_device(card, 1)
    except KvikError as error:
        assert "does not filter them" in str(error), error
    else:
        raise AssertionError("a VLAN on a bridge that does not filter")
    assert sh("ls /sys/class/net") == before
    kvik("bridge", "vlan", "other0", "on")
    domain.attach_device(card, 1)
    added = sorted(set(sh("ls /sys/class/net").split()) - set(before.split()))
    rows = json.loads(kvik("bridge", "vlan", "other0", "--json"))
    assert [row["first"] for row in rows if row["port"] == added[0]] == [30], rows
    domain.detach_device(card, 1)
    until("its tap is gone", lambda: sh("ls /sys/class/net") == before)
    kvik("bridge", "del", "other0")


def sent_to(port: str) -> int:
    """Frames that the bridge gave to a machine."""
    return int(Path(f"/sys/class/net/{port}/statistics/tx_packets").read_text())


def static() -> None:
    """Unknown addresses are flooded; one that was entered goes to its port alone, and no frame moves it."""
    one, two = guests()
    stranger, right, other = "52:54:00:99:99:99", tap("m2", 0), tap("m2", 3)
    one.run(f"arp -s 10.0.0.99 {stranger}")

    def burst() -> tuple[int, int]:
        before = (sent_to(right), sent_to(other))
        one.run("ping -c 20 -i 0.02 -W 1 10.0.0.99", check=False)
        return sent_to(right) - before[0], sent_to(other) - before[1]

    flooded = burst()
    assert min(flooded) >= 20, flooded
    kvik("bridge", "fdb", "lan0", "add", stranger, right, "10")
    rows = json.loads(kvik("bridge", "fdb", "lan0", "--json"))
    assert [(row["port"], row["vlan"]) for row in rows if row["mac"] == stranger] == [(right, 10)], rows
    given = burst()
    assert given[0] >= 20 and given[1] < 10, given
    # m2 claims the address on its trunk: it stays where it was put.
    two.run("ip link add link lant name lant.10 type vlan id 10", check=False)  # the VLANs' test has made it
    two.run(f"ip link set lant.10 down; ip link set lant.10 address {stranger}; ip link set lant.10 up")
    two.run("ip addr add 10.40.0.2/24 dev lant.10; ping -c 2 -W 1 10.40.0.1", check=False)
    given = burst()
    assert given[0] >= 20 and given[1] < 10, given
    kvik("bridge", "fdb", "lan0", "del", stranger, right, "10")
    # macTableManager='libvirt': the bridge learns nothing and floods nothing, the machines' addresses are entered.
    fdb = {entry.mac: entry.port for entry in Bridges(connect("kvik:///system")).fdb("fixed0")}
    assert fdb[mac("m1", 2)] == tap("m1", 2) and fdb[mac("m2", 2)] == tap("m2", 2), fdb
    assert one.reaches("10.2.0.2") and one.reaches("10.2.0.3")
    one.run(f"arp -s 10.2.0.99 {stranger}")
    before = sent_to(tap("m2", 2))
    one.run("ping -c 20 -i 0.02 -W 1 10.2.0.99", check=False)
    assert sent_to(tap("m2", 2)) - before < 10


def openvswitch() -> None:
    """The same on the kernel's Open vSwitch."""
    one, two = guests()
    told = sh("ovs-appctl dpctl/show")
    assert "system@ovs-system" in told, told
    taps = {tap("m1", 1), tap("m2", 1), tap("m2", 4)}
    assert all(name in told for name in taps), told
    one.run("ping -c 2 -i 0.2 -W 2 10.1.0.2", check=False)
    if "hit:0 " in sh("ovs-appctl dpctl/show"):
        # Here and there the lab's kernel hands a new ovs-vswitchd no packet ("lost" are as many as "missed").
        said("ovs-vswitchd hears nothing and is started again")
        sh("ovs-appctl exit; sleep 2")
        sh(f"ovs-vswitchd unix:{OVS}/db.sock --pidfile={OVS}/ovs-vswitchd.pid --detach --no-chdir --log-file={OVS}/log")
    assert {tap_master("m1", 1), tap_master("m2", 4)} == {"ovs-system"}
    assert one.reaches("10.1.0.2") and one.cannot_reach("10.1.0.3")
    # m2's trunk: VLAN 20 without a tag, 10 with it.
    two.run("ip link add link ovst name ovst.10 type vlan id 10; ip link set ovst.10 up")
    two.run("ip addr add 10.30.0.2/24 dev ovst.10; ip addr add 10.31.0.2/24 dev ovst")
    one.run("ip addr add 10.30.0.1/24 dev ovs")
    at_station("ip addr add 10.31.0.3/24 dev ovs")
    assert one.reaches("10.30.0.2") and two.reaches("10.31.0.3")
    flows = sh("ovs-appctl dpctl/dump-flows -m system@ovs-system")
    assert "push_vlan(vid=10" in flows and "pop_vlan" in flows, flows  # the kernel's own, not a program's


def vhost() -> None:
    """The cards' datapath is the kernel's, on QEMU and on kvik-vmm."""
    for guest, (vmm, cards) in zip(guests(), MACHINES.values(), strict=True):
        (pid,) = sh(f"pgrep -x {'kvik-vmm' if vmm == 'kvik' else 'qemu-system-x86'}").split()
        opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        queues = len(cards) + sum("queues='2'" in more for *_, more in cards)
        assert opened.count("/dev/vhost-net") == queues, (guest.name, opened)
        threads = sh(f"cat /proc/[0-9]*/comm /proc/{pid}/task/*/comm 2>/dev/null | sort -u | grep vhost-{pid}")
        assert threads.strip(), threads
        assert guest.reaches(f"10.0.0.{3 - int(guest.name[1])}")
    assert "multi_queue" in sh(f"ip -d link show {tap('m1', 0)}")


def slow() -> None:
    """A machine behind a link that delays and loses frames gets its address; the probe is not misled."""
    connection = connect("kvik:///system")
    sh(
        """
        ip link add far0 type bridge forward_delay 0
        ip link add near type veth peer name far
        ip link set near master slow0 up
        ip link set far master far0 up
        ip link set far0 up
        tc qdisc add dev near root netem delay 400ms 100ms loss 15%
        tc qdisc add dev far root netem delay 400ms 100ms loss 15%
        """
    )
    card = (
        "<interface type='bridge'><source bridge='far0'/><mac address='52:54:00:00:01:78'/><model type='virtio'/>"
        "</interface>"
    )
    connection.lookup_name("m1").attach_device(card, 1)
    one = Guest("m1")
    name = until("the card", lambda: one.run("cd /sys/class/net; grep -l 52:54:00:00:01:78 */address | cut -d/ -f1"))
    one.run(f"ip link set {name} up")
    # A guest's clock may be fast here: its client gives up before the link has answered, and is started again.
    client = f"udhcpc -i {name} -n -q -t 20 -T 3 -s /leased && echo leased"
    until("an address by the slow link", lambda: one.run(client, check=False).endswith("leased"))
    (lease,) = [lease for lease in connection.network("slow").leases() if lease.mac == "52:54:00:00:01:78"]
    until(
        "an answer by the slow link",
        lambda: one.reaches("10.9.0.1") or "bytes from" in one.run("ping -c 5 -W 3 10.9.0.1", check=False),
    )
    assert lease.address in one.run(f"ip addr show {name}")
    connection.lookup_name("m1").detach_device(card, 1)
    sh("ip link del near; ip link del far0")
    document = parse_network(connection.network("slow").xml())
    for delay in (0, 250):
        sh(f"tc qdisc replace dev slow0 root netem delay {delay}ms")
        assert probe(document) == [], delay
    sh("tc qdisc del dev slow0 root")


if __name__ == "__main__":
    chosen, *arguments = sys.argv[1:]
    globals()[chosen](*arguments)
    print(f"{chosen}: well")
