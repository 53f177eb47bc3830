"""`kvik run --allow NAME` with real machines: what they reach of a world that would answer them anything."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.network.site import ALIAS, Site, kill, needs, until, v4, v6

pytestmark = needs
LAN = """<network><name>lan</name><forward mode='nat'><nat ipv6='yes'/></forward>
  <bridge name='virbr5' stp='off' delay='0'/><domain name='lan'/>
  <ip address='192.168.77.1' prefix='24'><dhcp><range start='192.168.77.2' end='192.168.77.254'/></dhcp></ip>
  <ip family='ipv6' address='fd00:77::1' prefix='64'/></network>"""
GET = (
    'get() { text=$(printf "GET ${2:-/} HTTP/1.0\\r\\n\\r\\n" | nc -w 2 "$1" 80 2>/dev/null | grep page); '
    'echo "${text:-no}"; }\n'
)

DRIP = "{ (printf 'GET /drip HTTP/1.0\\r\\n\\r\\n'; sleep 900) | nc example.test 80; } </dev/null >/tmp/drip 2>&1 &"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    try:
        document = site.path / "lan.xml"
        document.write_text(LAN)
        site.out("net-define", str(document))
        site.out("net-start", "lan")
        for name, allowed in (("one", "example.test"), ("two", "other.test")):
            done = site("run", "--name", name, "--detach", "--network", "network=lan", "--allow", allowed)
            assert done.returncode == 0, done.stderr
        yield site
    finally:
        site.end()


def told(text: str) -> dict[str, str]:
    """`word rest` a line."""
    return {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in text.splitlines() if " " in line}


def test_a_machine_reaches_its_names_and_nothing_else_by_no_way(site: Site) -> None:
    names = ("example.test", "www.example.test", ALIAS)
    first = [f"echo unasked $(get {v4(10)})", *(f"echo {name} $(get {name})" for name in names)]
    first += [f"echo asked $(get {v4(10)})", f"echo asked6 $(get '[{v6(10)}]')"]
    nobody = {  # all at once: each of them is a wait for nothing
        "other.test": "get other.test",
        "address": f"get {v4(11)}",
        "address6": f"get '[{v6(11)}]'",
        "tcp53": f"nc -w 2 {v4(53)} 53 </dev/null >/dev/null 2>&1 && echo open || echo no",
        "tls": f"nc -w 2 {v4(53)} 853 </dev/null >/dev/null 2>&1 && echo open || echo no",
        "ping": f"ping -c 1 -W 2 {v4(11)} >/dev/null && echo answered || echo no",
        "ping6": f"ping -6 -c 1 -W 2 {v6(11)} >/dev/null && echo answered || echo no",
        "gateway": "ping -c 1 -W 2 192.168.77.1 >/dev/null && echo answered || echo no",
    }
    asked = {
        "aaaa": "-type=aaaa example.test",
        "refused": "secret.other.test",
        "second": f"example.test {v4(54)}",
        "six": f"example.test {v6(53)}",
    }
    tries = [GET, *first]
    tries += [f"echo {word} $({command}) &" for word, command in nobody.items()]
    tries += [f"echo {word} $(nslookup {what} 2>&1 | tr '\\n' ' ') &" for word, what in asked.items()]
    until(lambda: "fd00:77:" in site.shell("one", "ip -6 addr"))
    one = told(site.shell("one", "\n".join([*tries, "wait"])))
    assert one["unasked"] == "no", "nobody asked for its name yet"
    for name, number in (("example.test", 10), ("www.example.test", 10), (ALIAS, 12)):
        assert re.fullmatch(f"page {number} v[46]", one[name]), (name, one)
    assert one["asked"] == "page 10 v4" and one["asked6"] == "page 10 v6", one
    assert v6(10) in one["aaaa"]
    for word in nobody:
        assert one[word] == "no", (word, one)
    assert "REFUSED" in one["refused"].upper()
    assert v4(10) not in one["second"] and v4(10) not in one["six"], one
    # The other machine's list is its own, whatever this one asked for.
    two = told(
        site.shell("two", f"{GET}echo own $(get other.test)\necho mine $(get {v4(10)})\necho name $(get example.test)")
    )
    assert re.fullmatch("page 11 v[46]", two["own"]) and two["mine"] == two["name"] == "no", two


def test_the_list_of_a_running_machine_changes_and_connections_stay(site: Site) -> None:
    site.shell("one", DRIP)
    until(lambda: "drip" in site.shell("one", "cat /tmp/drip"))
    live = site.out("dumpxml", "one")
    found = re.search(r"<interface .*?</interface>", live, re.DOTALL)
    assert found is not None
    document = site.path / "interface.xml"
    more = "<parameter name='ALLOW' value='more.test'/></filterref>"
    document.write_text(found[0].replace("</filterref>", more))
    site.out("update-device", "one", str(document), "--live")
    size = int(site.shell("one", "wc -c </tmp/drip"))
    until(lambda: int(site.shell("one", "wc -c </tmp/drip")) > size)
    now = told(site.shell("one", f"{GET}echo more $(get more.test)\necho example.test $(get example.test)"))
    assert "page 13" in now["more"] and "page 10" in now["example.test"], now
    document.write_text(re.sub(r"<parameter name='ALLOW' value='(?!more)[^']*'/>", "", document.read_text()))
    site.out("update-device", "one", str(document), "--live")
    now = told(site.shell("one", f"{GET}echo more $(get more.test)\necho example.test $(get example.test)"))
    assert "page 13" in now["more"] and now["example.test"] == "no", now


MOVED = """<network><name>moved</name><forward mode='nat'/><bridge name='virbr6' stp='off' delay='0'/>
  <ip address='192.168.{0}.1' prefix='24'><dhcp><range start='192.168.{0}.2' end='192.168.{0}.254'/></dhcp></ip>
</network>"""
RENEW = "ip addr flush dev eth0; udhcpc -i eth0 -s /etc/udhcpc.script -n -q >/dev/null 2>&1\n"


def test_it_follows_the_machine_to_another_network(site: Site) -> None:
    document = site.path / "moved.xml"

    def start(subnet: int) -> None:
        document.write_text(MOVED.format(subnet))
        site.out("net-define", str(document))
        site.out("net-start", "moved")

    def move(source: str) -> subprocess.CompletedProcess[str]:
        found = re.search(r"<interface .*?</interface>", site.out("dumpxml", "two"), re.DOTALL)
        assert found is not None
        text = re.sub("<interface type='[^']*'>", f"<interface type='{source.split('=', maxsplit=1)[0]}'>", found[0])
        document.write_text(re.sub("<source [^>]*/>", f"<source {source}/>", text))
        return site("update-device", "two", str(document), "--live")

    def reaches() -> tuple[str, str, str]:
        """Its name server, and what it finds under the name that is allowed and one that is not."""
        script = f"{RENEW}{GET}echo by $(cat /etc/resolv.conf)\necho own $(get other.test)\n"
        found = told(site.shell("two", f"{script}echo alien $(get example.test)"))
        return found["by"].split("nameserver ")[1].split()[0], found["own"], found["alien"]

    start(78)
    assert move("network='moved'").returncode == 0
    assert reaches() == ("192.168.78.1", "page 11 v4", "no")
    # The network comes back with another gateway.
    site.out("net-destroy", "moved")
    start(79)
    until(lambda: "192.168.79.1" in rules(site))
    assert reaches() == ("192.168.79.1", "page 11 v4", "no")
    # Where nobody could answer its questions it does not go, and goes on where it is.
    site.within("ip link add br9 type bridge", "ip link set br9 addrgenmode none", "ip link set br9 up")
    refused = move("bridge='br9'")
    assert refused.returncode != 0 and "needs an address of this host on the bridge" in refused.stderr, refused.stderr
    assert reaches() == ("192.168.79.1", "page 11 v4", "no")
    assert move("network='lan'").returncode == 0
    assert reaches()[1:] == ("page 11 v4", "no")
    site.out("net-destroy", "moved")


def resolvers(site: Site) -> list[Path]:
    return sorted((site.paths.run / "nwfilter-binding").glob("*.names.pid"))


def rules(site: Site) -> str:
    return site.inside("nft", "list", "ruleset")


def test_resolvers_and_rules_outlive_the_daemon_and_not_the_machine(site: Site) -> None:
    pids = [int(path.read_text()) for path in resolvers(site)]
    assert len(pids) == 2
    kill(pids[0])
    until(lambda: all(path.read_text().strip() != str(pids[0]) for path in resolvers(site)))
    assert "page 11" in told(site.shell("two", f"{GET}echo own $(get other.test)"))["own"]
    pids = [int(path.read_text()) for path in resolvers(site)]
    site.kill()
    site.serve()
    assert [int(path.read_text()) for path in resolvers(site)] == pids, "they went on"
    two = told(site.shell("two", f"{GET}echo own $(get other.test)\necho mine $(get {v4(10)})"))
    assert "page 11" in two["own"] and two["mine"] == "no", two
    # Both machines and the daemon die at once: the next daemon leaves nothing of them.
    taps = [path.name.removesuffix(".names.pid") for path in resolvers(site)]
    assert all(tap in rules(site) for tap in taps)
    statuses = [path.read_text() for path in (site.paths.run / "qemu").glob("*.xml")]
    machines = [int(found[1]) for text in statuses if (found := re.search(r"<domstatus [^>]*pid=.(\d+)", text))]
    assert len(machines) == 2
    site.kill()
    for pid in machines:
        kill(pid)
    site.serve()
    until(lambda: not resolvers(site))
    assert not any(tap in rules(site) for tap in taps)
    assert not [pid for pid in pids if b"dnsmasq" in cmdline(pid)]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
