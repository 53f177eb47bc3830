"""From configuration to devices, where the host gives nothing special."""

from __future__ import annotations

import socket

import pytest

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.config import NetConfig, VsockConfig
from kvik.vmm.nets import make_net, make_vsock, random_mac
from kvik.vmm.virtio.net import S_LINK_UP, parse_mac
from kvik.vmm.virtio.vsock import VsockDevice


def test_a_card_in_nothing():
    device = make_net(NetConfig(backend="none", mac="52:54:00:00:00:01", queues=3, mtu=1400, rx_bps=5), "net0")
    assert device.pairs == 3 and device.config["mtu"] == 1400 and device.receive_limit.limited
    assert "kernel datapath" in device.vhost_reason
    device.close()


def test_a_card_whose_cable_is_out():
    device = make_net(NetConfig(backend="none", link=False), "net0")
    assert not device.config["status"] & S_LINK_UP
    device.close()


def test_a_card_on_a_socket_by_path_and_by_descriptor(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "passt"))
        server.listen()
        device = make_net(NetConfig(backend="passt", path=str(tmp_path / "passt")), "net0")
        assert device.backend.kind == "stream"
        device.close()
    one, other = socket.socketpair()
    with other:
        device = make_net(NetConfig(backend="passt", fds=(one.detach(),)), "net0")
        device.close()
        assert other.recv(1) == b""


@pytest.mark.parametrize("named", [{"backend": "carrier-pigeon"}, {"backend": "passt"}])
def test_backends_that_cannot_be(named):
    with pytest.raises(InvalidArgument):
        make_net(NetConfig(**named), "net0")


def test_an_error_closes_the_descriptors_it_was_given():
    one, other = socket.socketpair()
    with other:
        with pytest.raises(InvalidArgument):
            make_net(NetConfig(backend="passt", fds=(one.detach(),), mac="nonsense"), "net0")
        assert other.recv(1) == b""


def test_random_addresses_are_a_cards():
    assert len({parse_mac(random_mac()) for _ in range(50)}) == 50


def test_vsock(tmp_path):
    device = make_vsock(VsockConfig(cid=9, uds=str(tmp_path / "v")), "vsock0")
    assert isinstance(device, VsockDevice) and device.config["guest_cid"] == 9
    device.close()


def test_a_confined_machine_makes_no_tap_and_says_what_to_give_it(monkeypatch):
    def refused(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("kvik.vmm.nets.os.open", refused)
    with pytest.raises(HostError, match=r"/dev/net/tun: Operation not permitted.*fds?=N"):
        make_net(NetConfig(), "net0")
