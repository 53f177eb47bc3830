"""What a live document says of interfaces on networks, for people: as libvirt has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvik.conf.devices.interface import Interface
from kvik.conf.domain import Domain, parse_domain
from kvik.errors import NoNetwork
from kvik.manager.interface_changes import as_defined
from kvik.manager.interfaces import shown

MAC = "<mac address='52:54:00:00:00:01'/>"
VF = "<address type='pci' domain='0' bus='1' slot='16' function='0'/>"


class Networks:
    def lookup_name(self, name: str) -> Any:
        if name == "gone":
            raise NoNetwork("no such network")
        return SimpleNamespace(document=SimpleNamespace(owns_bridge=name == "default"))


def document(source: str, kind: str = "network") -> Domain:
    interface = f"<interface type='{kind}'>{MAC}<source {source}</source></interface>"
    return parse_domain(
        f"<domain type='test'><name>a</name><os><type>hvm</type></os><devices>{interface}</devices></domain>"
    )


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("network='pool' dev='e1' mode='bridge'>", "direct"),
        (f"network='vfs'>{VF}", "hostdev"),
        ("network='lan' bridge='br0'>", "bridge"),
        ("network='default' bridge='virbr0'>", "network"),
        ("network='gone' bridge='br0'>", "network"),
    ],
)
def test_an_interface_on_a_network_is_shown_as_what_it_is_and_means_the_network_when_it_comes_back(
    source: str, kind: str
) -> None:
    live = document(source)
    seen: Any = shown(live, Networks())  # type: ignore[arg-type]  # what it asks of them
    (old,), (new,) = live.devices.interfaces, seen.devices.interfaces
    assert (old.type, new.type) == ("network", kind)
    assert new.source == old.source
    as_defined(old, new)
    assert new == old
    if kind == "network":
        assert seen is live


def test_another_interface_stays_what_it_is() -> None:
    live = document("bridge='br0'>", "bridge")
    assert shown(live, Networks()) is live  # type: ignore[arg-type]  # as above
    (old,) = document("network='default' bridge='virbr0'>").devices.interfaces
    (new,) = live.devices.interfaces
    as_defined(old, new)
    assert isinstance(new, Interface)
    assert new.type == "bridge", "it leaves the network"
