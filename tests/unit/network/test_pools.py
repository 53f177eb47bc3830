"""Pools that are taken from a physical function: what its virtual functions are when the network starts."""

from __future__ import annotations

import pytest

from kvik.conf.network import Network
from kvik.conf.network_validate import load_network
from kvik.errors import OperationInvalid
from kvik.host import sriov
from kvik.host.sriov import VirtualFunction
from kvik.network.runtime import _fill_pool

FUNCTIONS = [VirtualFunction(0, "0000:01:10.0", "v0"), VirtualFunction(1, "0000:01:10.2", "")]


def started(mode: str, functions: list[VirtualFunction], monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setattr(sriov, "virtual_functions", lambda dev: functions if dev == "enp1s0" else [])
    document = load_network(f"<network><name>n</name><forward mode='{mode}'><pf dev='enp1s0'/></forward></network>")
    _fill_pool(document)
    return document


def test_mode_hostdev_has_the_functions_and_macvtap_their_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = started("hostdev", FUNCTIONS, monkeypatch).forward
    assert forward is not None
    assert [address.pci_text for address in forward.addresses] == ["0000:01:10.0", "0000:01:10.2"]
    forward = started("passthrough", FUNCTIONS, monkeypatch).forward
    assert forward is not None
    assert [interface.dev for interface in forward.interfaces] == ["v0"]  # the other is a machine's already


def test_functions_without_interfaces_are_none_for_macvtap(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OperationInvalid, match="no virtual function of enp1s0, which network 'n' is to use"):
        started("private", FUNCTIONS[1:], monkeypatch)
