"""Two real machines on a network of both families: addresses, names, gateway, each other, the world; ssh into one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from functional.network.site import Site, needs, until, v6
from functional.network.test_allowed_guests import GET, LAN, told

pytestmark = needs


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    try:
        document = site.path / "lan.xml"
        document.write_text(LAN)
        site.out("net-define", str(document))
        site.out("net-start", "lan")
        for name in ("one", "two"):
            done = site("run", "--name", name, "--detach", "--network", "network=lan")
            assert done.returncode == 0, done.stderr
        yield site
    finally:
        site.end()


def own6(site: Site, name: str) -> str:
    until(lambda: re.search("inet6 fd00:77:.*global(?!.*tentative)", site.shell(name, "ip -6 addr show dev eth0")))
    found = re.search(r"inet6 (fd00:77:[0-9a-f:]+)/64", site.shell(name, "ip -6 addr show dev eth0"))
    assert found is not None
    return found[1]


def test_machines_have_ipv6_addresses_names_each_other_and_the_world(site: Site) -> None:
    addresses = {name: own6(site, name) for name in ("one", "two")}
    # dnsmasq asks the address itself before it gives it a name (ra-names).
    until(lambda: addresses["two"] in site.shell("one", "nslookup -type=aaaa two 2>&1"))
    one = told(
        site.shell(
            "one",
            f"{GET}echo gateway $(ping -6 -c 1 -W 5 fd00:77::1 >/dev/null && echo answered)\n"
            "echo two $(ping -6 -c 1 -W 5 two >/dev/null && echo answered)\n"
            f"echo world $(printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 '[{v6(10)}]' 80 | tail -n 2)\n",
        )
    )
    assert one == {"gateway": "answered", "two": "answered", "world": "page 10 v6 from 2001:db8:1::1"}
    sources = json.loads(site.out("--json", "domifaddr", "one"))
    assert {row["address"] for row in sources} >= {addresses["one"]}


@pytest.mark.skipif(shutil.which("dropbear") is None, reason="needs dropbear (Debian: dropbear-bin)")
@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs openssh-client")
def test_ssh_finds_a_machine_waits_for_it_and_knows_it_again(site: Site) -> None:
    """The machine's port 22 leads to a real ssh server on the host's side of the bridge."""
    home = site.path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    keys = {
        "client": ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"],
        "host": ["dropbearkey", "-t", "ed25519", "-f"],
    }
    for name, command in keys.items():
        subprocess.run([*command, str(site.path / name)], check=True, capture_output=True)
    (home / ".ssh/authorized_keys").write_text((site.path / "client.pub").read_text())
    (home / ".ssh/authorized_keys").chmod(0o600)
    passwd = site.path / "passwd"
    passwd.write_text(f"root:x:0:0::/root:/bin/sh\nadmin:x:0:0::{home}:/bin/sh\n")
    site.inside("mount", "--bind", str(passwd), "/etc/passwd")
    files = ["-r", str(site.path / "host"), "-P", str(site.path / "p")]
    server = ["dropbear", "-F", "-s", "-p", "192.168.77.1:2222", *files]
    into = [f"--target={site.holder.pid}", "--net", "--mount"]
    ssh = ["-m", "kvik.cli.main", "ssh", "one", "-l", "admin", "-i", str(site.path / "client")]
    environ = {**site.environ, "XDG_STATE_HOME": str(site.path / "state")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = ["nsenter", *into, sys.executable, *ssh, *words]
        return subprocess.run(argv, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)

    done = run("--timeout", "1", "--", "true")
    assert done.returncode == 255 and "port 22 does not answer as ssh" in done.stderr and "refused" in done.stderr
    with subprocess.Popen(["nsenter", *into, *server], stderr=subprocess.DEVNULL) as process:
        try:
            site.shell("one", "nc -ll -p 22 -e nc 192.168.77.1 2222 </dev/null >/dev/null 2>&1 &")
            done = run("--", "echo", "$USER", "'a  b'")
            assert (done.returncode, done.stdout) == (0, "admin a  b\n"), done.stderr
            assert run("--", "exit 7").returncode == 7
            hosts = site.path / "state/kvik/known_hosts"
            alias = f"kvik-{site.out('domuuid', 'one').strip()}"
            subprocess.run(["ssh-keygen", "-F", alias, "-f", str(hosts)], check=True, capture_output=True)
            # Another key under the machine's identity is refused.
            subprocess.run([*keys["client"], str(site.path / "other")], check=True, capture_output=True)
            other = (site.path / "other.pub").read_text().split()[1]
            hosts.write_text(f"{alias} ssh-ed25519 {other}\n")
            done = run("--", "true")
            assert done.returncode == 255 and "HOST IDENTIFICATION HAS CHANGED" in done.stderr
        finally:
            process.terminate()


PRIVATE = """<network><name>private</name><forward mode='nat'/><bridge name='virbr9' stp='off' delay='0'/>
<ip address='192.168.79.1' prefix='24'><dhcp><range start='192.168.79.2' end='192.168.79.9'/></dhcp></ip></network>"""


def test_who_drops_a_networks_packets_is_told_to_whoever_looks_at_it(site: Site) -> None:
    document = site.path / "private.xml"
    document.write_text(PRIVATE)
    site.within("nft add table inet evil")
    site.inside("nft", "add chain inet evil fw { type filter hook forward priority 0; policy drop; }")
    try:
        site.out("net-create", str(document))
        until(lambda: site("net-info", "private").stderr)
        said = site("net-info", "private").stderr
        assert "warning: a guest's packet does not reach the world: dropped by the policy of chain fw" in said, said
        assert "to let it through: nft insert rule inet evil fw iifname virbr9 accept && " in said, said
        assert site("net-start", "private").stderr == site("net-dhcp-leases", "private").stderr == said
    finally:
        site.out("net-destroy", "private")
        site.within("nft delete table inet evil")


ROUTED = """<network><name>routed</name><forward mode='route'/><bridge name='virbr6' stp='off' delay='0'/>
<ip family='ipv6' address='2001:db8:5::1' prefix='64'/></network>"""
INSIDE = """<network><name>inside</name><bridge name='virbr7' stp='off' delay='0'/><domain name='inside'/>
<ip family='ipv6' address='fd00:88::1' prefix='64'/></network>"""


def global6(site: Site, name: str, device: str) -> str:
    """A machine's address there, made of what its router advertises."""
    until(lambda: re.search(r"inet6 .*global(?!.*tentative)", site.shell(name, f"ip -6 addr show dev {device}")))
    found = re.search(r"inet6 ([0-9a-f:]+)/64 scope global", site.shell(name, f"ip -6 addr show dev {device}"))
    assert found is not None
    return found[1]


def unplug(site: Site, network: str, *names: str) -> None:
    """Its interfaces go from the machines; back when their slots are free again."""
    for name in names:
        rows = [line.split() for line in site.out("domiflist", name).splitlines() if network in line.split()]
        for row in rows:
            site.out("detach-interface", name, row[1], "--mac", row[-1], "--live")
        until(lambda name=name: network not in site.out("domiflist", name).split())


def test_on_a_routed_network_the_world_sees_a_machines_own_address_and_on_an_isolated_one_nothing(site: Site) -> None:
    for name, xml in (("routed", ROUTED), ("inside", INSIDE)):
        document = site.path / f"{name}.xml"
        document.write_text(xml)
        site.out("net-create", str(document))
    site.outside("ip -6 route add 2001:db8:5::/64 via 2001:db8:1::1")
    page = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 '[{v6(10)}]' 80 | tail -n 2"
    try:
        for name in ("one", "two"):
            site.out("attach-interface", name, "network", "inside", "--model", "virtio", "--live")
            site.shell(name, "ip link set eth0 down; ip link set eth1 up")
        inside = {name: global6(site, name, "eth1") for name in ("one", "two")}
        assert all(address.startswith("fd00:88:") for address in inside.values())
        told = site.shell(
            "one",
            f"ping -6 -c 1 -W 5 {inside['two']} >/dev/null && echo two\n"
            "ping -6 -c 1 -W 5 fd00:88::1 >/dev/null && echo gateway\n"
            f"ip -6 route | grep -q ^default || echo no way out\n{page}",
        )
        assert told.split("\n") == ["two", "gateway", "no way out", ""]
        # What is heard on its interface is its address, though nobody lent it.
        heard = site.out("domifaddr", "one", "--source", "arp")
        assert inside["one"] in heard
        site.out("attach-interface", "two", "network", "routed", "--model", "virtio", "--live")
        site.shell("two", "ip link set eth2 up")
        routed = global6(site, "two", "eth2")
        assert routed.startswith("2001:db8:5:")
        until(lambda: site.shell("two", page) == f"page 10 v6\nfrom {routed}\n")
        status = json.loads(site.out("--json", "dns", "status"))["networks"]
        assert [(row["network"], row["domain"], row["why"]) for row in status] == [
            ("inside", "inside", ""),
            ("lan", "lan", ""),
            ("routed", "", "it has no <domain name=.../>"),
        ]
    finally:
        for name in ("one", "two"):
            site.shell(name, "ip link set eth1 down; ip link set eth2 down; ip link set eth0 up")
        for name in ("routed", "inside"):
            unplug(site, name, "one", "two")
            site.out("net-destroy", name)


SERVED = """<network><name>served</name>{forward}<bridge name='virbr8' stp='off' delay='0'/><domain name='served'/>
<ip family='ipv6' address='fd00:99::1' prefix='64'><dhcp><range start='fd00:99::100' end='fd00:99::1ff'/>
<host id='0:3:0:1:52:54:00:99:00:01' name='web' ip='fd00:99::50'/></dhcp></ip></network>"""
CLIENT = "/usr/sbin/dhclient"
# dhclient-script(8): what it has learned is in its environment.
TAKE = """#!/bin/sh
[ -z "$new_ip6_address" ] || ip -6 addr add "$new_ip6_address/$new_ip6_prefixlen" dev "$interface"
[ -z "$old_ip6_address" ] || ip -6 addr del "$old_ip6_address/$old_ip6_prefixlen" dev "$interface"
"""
SEND = """
import socket, sys
with socket.create_server(("192.168.77.1", 7000)) as server:
    print("ready", flush=True)
    for _ in range(int(sys.argv[1])):
        with server.accept()[0] as taker, open(sys.argv[2], "rb") as file:
            taker.sendfile(file)
"""


def give_client(site: Site, *names: str) -> None:
    """Debian's DHCP client, with the libraries that it needs, by the machines' own network."""
    files = [CLIENT, *re.findall(r"(?:=> |\t)(/\S+)", subprocess.check_output(["ldd", CLIENT], text=True))]
    archive, script = site.path / "client.tar", site.path / "take"
    script.write_text(TAKE)
    script.chmod(0o755)
    take = ["--transform", f"s,^{str(script).lstrip('/')},take,", str(script)]
    subprocess.run(["tar", "-chPf", archive, "--transform", "s,^/,,", *take, *files], check=True)
    into = ["nsenter", f"--target={site.holder.pid}", "--net", "--mount"]
    with subprocess.Popen(
        [*into, sys.executable, "-c", SEND, str(len(names)), archive], stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None and server.stdout.readline()
        for name in names:
            site.shell(
                name, f"cd / && nc 192.168.77.1 7000 </dev/null | tar x; mkdir -p /var/lib/dhcp; [ -x {CLIENT} ]"
            )


def has_link_local(site: Site, name: str, device: str) -> None:
    """The client does not wait until that is its own."""
    until(lambda: re.search("inet6 fe80.*link *$", site.shell(name, f"ip -6 addr show dev {device}"), re.MULTILINE))


@pytest.mark.skipif(shutil.which("dhclient", path="/usr/sbin") is None, reason="needs dhclient (isc-dhcp-client)")
def test_a_real_client_gets_its_own_address_by_dhcpv6_and_its_name_resolves(site: Site) -> None:
    give_client(site, "one", "two")
    lease = (
        f"{CLIENT} -6 -1 -D LL -sf /take -pf /var/lib/dhcp/pid -lf /var/lib/dhcp/leases -q eth{{}} 2>&1; echo ended $?"
    )
    for number, forward in enumerate(("", "<forward mode='nat'><nat ipv6='yes'/></forward>"), 3):
        document = site.path / "served.xml"
        document.write_text(SERVED.format(forward=forward))
        site.out("net-create", str(document))
        try:
            for name, mac in (("one", "52:54:00:99:00:01"), ("two", "52:54:00:99:00:02")):
                more = ("--model", "virtio", "--live", "--mac", mac)
                site.out("attach-interface", name, "network", "served", *more)
                device = site.shell(name, f"grep -l {mac} /sys/class/net/*/address").split("/")[4]
                site.shell(name, f"ip link set eth0 down; ip link set {device} up")
                has_link_local(site, name, device)
                said = site.shell(name, lease.format(device.removeprefix("eth")))
                assert "ended 0" in said, said
                site.shell(name, f"echo {device} >/tmp/device")
            own = site.shell("one", "ip -6 addr show dev $(cat /tmp/device)")
            assert "inet6 fd00:99::50/" in own, own
            assert re.search(
                r"inet6 fd00:99::1[0-9a-f]{2}/", site.shell("two", "ip -6 addr show dev $(cat /tmp/device)")
            )
            assert "fd00:99::50" in site.shell("two", "nslookup -type=aaaa web.served fd00:99::1")
            assert "0% packet loss" in site.shell("two", "ping -6 -c 1 -W 5 fd00:99::50")
            rows = [line for line in site.out("net-dhcp-leases", "served").splitlines() if "fd00:99::50" in line]
            assert len(rows) == 1 and "web" in rows[0], rows
            page = site.shell("one", f"printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 5 '[{v6(10)}]' 80 | tail -n 2")
            assert page == ("page 10 v6\nfrom 2001:db8:1::1\n" if forward else ""), number
        finally:
            for name in ("one", "two"):
                site.shell(name, "kill $(cat /var/lib/dhcp/pid); rm -f /var/lib/dhcp/leases; ip link set eth0 up")
            unplug(site, "served", "one", "two")
            site.out("net-destroy", "served")
