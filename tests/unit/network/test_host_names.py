"""Names of machines on the host: which networks have them, who is told, and that nothing but our own file changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik.conf.network import complete_network, parse_network
from kvik.errors import OperationInvalid, OperationUnsupported
from kvik.network.host_names import MARK, HostNames, Zone, _Dnsmasq, zone_of
from kvik.paths import Paths


def zone(inside: str, *, active: bool = True) -> Zone:
    document = parse_network(f"<network><name>lan</name>{inside}</network>")
    complete_network(document, ())
    return zone_of(document, active=active)


IP = "<ip address='10.7.0.1' prefix='24'/><ip family='ipv6' address='fd00:7::1' prefix='64'/>"
NAT = "<forward mode='nat'/><bridge name='virbr7'/>"


def test_a_network_with_a_domain_of_its_own_is_asked_at_its_addresses() -> None:
    found = zone(f"{NAT}<domain name='Lab.Example'/>{IP}")
    assert (found.domain, found.bridge, found.servers) == ("lab.example", "virbr7", ["10.7.0.1", "fd00:7::1"])
    assert not found.why


@pytest.mark.parametrize(
    ("inside", "why"),
    [
        (f"{NAT}{IP}", "it has no <domain"),
        (f"{NAT}<domain name='a b'/>{IP}", "is not a DNS name"),
        (f"{NAT}<domain name='lab' localOnly='no'/>{IP}", "localOnly='no'"),
        (f"{NAT}<domain name='lab'/><dns enable='no'/>{IP}", "its DNS is off"),
        ("<bridge name='virbr7'/><domain name='lab'/>", "it has no address"),
        ("<forward mode='bridge'/><bridge name='br0'/>", "not its own"),
    ],
)
def test_of_others_the_reason_is_said(inside: str, why: str) -> None:
    found = zone(inside)
    assert not found.servers and why in found.why


def test_an_inactive_network_is_not_asked() -> None:
    assert "not active" in zone(f"{NAT}<domain name='lab'/>{IP}", active=False).why


def files_below(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
    (tmp_path / "etc/nsswitch.conf").write_text("hosts: files dns\n")
    return tmp_path


ZONES = [zone(f"{NAT}<domain name='lab'/>{IP}"), zone(f"{NAT}{IP}")]


def test_a_host_that_asks_elsewhere_is_left_as_it_is(root: Path) -> None:
    before = files_below(root)
    names = HostNames(Paths.system(root))
    assert names.status(ZONES).resolver == ""
    with pytest.raises(OperationUnsupported, match="no resolver that could ask for one domain") as caught:
        names.enable(ZONES)
    assert "kvik ssh" in str(caught.value.remedy)
    assert not names.disable(ZONES)
    assert files_below(root) == before
    with pytest.raises(OperationUnsupported, match="session"):
        HostNames(Paths.session({"HOME": str(root), "XDG_RUNTIME_DIR": str(root / "run")})).enable(ZONES)


@pytest.mark.parametrize(
    ("resolv", "switch"),
    [
        ("nameserver 127.0.0.53\noptions edns0\n", "hosts: files dns\n"),
        ("nameserver 192.0.2.1\n", "passwd: files\nhosts:  files resolve [!UNAVAIL=return] dns\n"),
    ],
)
def test_systemd_resolved_is_known_by_its_stub_or_its_module(root: Path, resolv: str, switch: str) -> None:
    (root / "etc/resolv.conf").write_text(resolv)
    (root / "etc/nsswitch.conf").write_text(switch)
    names = HostNames(Paths.system(root))
    assert names.status(ZONES).resolver == "", "it does not run"
    (root / "run/systemd/resolve").mkdir(parents=True)
    assert names.status(ZONES).resolver == "systemd-resolved"
    before = files_below(root)
    assert names.enable(ZONES) == "systemd-resolved"
    assert names.status(ZONES).enabled and names.status(ZONES).file == ""
    assert names.disable(ZONES)
    assert files_below(root) == before


def test_one_file_of_our_own_is_written_changed_and_taken_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Dnsmasq, "_runs", lambda self: True)
    (root / "etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
    (root / "etc/NetworkManager/dnsmasq.d").mkdir(parents=True)
    before = files_below(root)
    names = HostNames(Paths.system(root))
    assert names.enable(ZONES) == "NetworkManager's dnsmasq"
    path = root / "etc/NetworkManager/dnsmasq.d/kvik.conf"
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.read_text().splitlines() == [
        MARK,
        "server=/lab/10.7.0.1",
        "server=/lab/fd00:7::1",
        "rebind-domain-ok=/lab/",
        "rev-server=10.7.0.0/24,10.7.0.1",
        "rev-server=fd00:7::/64,10.7.0.1",
    ]
    assert names.status(ZONES).file == str(path)
    # The next daemon goes on; a network has gone.
    names = HostNames(Paths.system(root))
    names.refresh([])
    assert path.read_text() == MARK + "\n"
    assert names.disable([])
    assert files_below(root) == before
    names.refresh(ZONES)
    assert files_below(root) == before, "what is off stays off"
    # A file of that name that somebody else wrote stays his.
    path.write_text("server=/corp/192.0.2.9\n")
    with pytest.raises(OperationInvalid, match=r"kvik\.conf is there and is not kvik's"):
        names.enable(ZONES)
    assert path.read_text() == "server=/corp/192.0.2.9\n" and not names.status(ZONES).enabled
