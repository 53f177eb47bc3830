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
    assert done.returncode == 1 and "port 22 does not answer as ssh" in done.stderr and "refused" in done.stderr
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
