"""From the configuration of a network card, or of a vsock device, to the device: opens what it needs on the host.

    machine.add(make_net(config, "net0"))

Descriptors that the configuration names belong to the device from then on. Raises HostError and InvalidArgument, with
nothing left open that was opened here.
"""

from __future__ import annotations

import os

from kvik.errors import HostError, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.backends.net import NetBackend
    from kvik.vmm.config import NetConfig, VsockConfig
    from kvik.vmm.virtio.device import VirtioDevice
    from kvik.vmm.virtio.net import NetDevice

__all__ = ["make_net", "make_vsock", "random_mac"]


def random_mac() -> str:
    """A locally administered address with the prefix that KVM's guests have everywhere."""
    return "52:54:00:" + os.urandom(3).hex(":")


def make_net(config: NetConfig, name: str) -> NetDevice:
    """The card that `config` describes. Rates are in bytes and packets a second, "rx" is what the guest receives."""
    from kvik.vmm.ratelimit import RateLimiter
    from kvik.vmm.virtio.net import NetDevice

    backend = _backend(config)
    try:
        device = NetDevice(
            name,
            backend,
            config.mac or random_mac(),
            mtu=config.mtu,
            queue_size=config.queue_size,
            vhost=config.vhost,
            vhost_fds=config.vhost_fds,
            receive_limit=RateLimiter(config.rx_bps, config.rx_pps),
            transmit_limit=RateLimiter(config.tx_bps, config.tx_pps),
        )
    except BaseException:
        backend.close()
        raise
    if config.packed and device.vhost is None:
        from kvik.vmm.virtio.queue import RING_PACKED

        device.ring_features |= RING_PACKED
    if not config.link:
        device.set_link(False)
    return device


def _backend(config: NetConfig) -> NetBackend:
    if config.backend == "none":
        from kvik.vmm.backends.net import NoBackend

        return NoBackend(config.queues)
    if config.backend in ("passt", "user", "stream", "socket"):
        from kvik.vmm.backends.netsocket import StreamBackend, socket_backend

        if config.fds:
            return socket_backend(config.fds[0])
        if not config.path:
            raise InvalidArgument(
                f"the network backend {config.backend} needs the path of a socket, or its descriptor",
                remedy="start `passt --socket PATH` and give path=PATH",
            )
        return StreamBackend.connect(config.path)
    if config.backend != "tap":
        raise InvalidArgument(f"{config.backend!r} is no network backend: tap, passt, none")
    from kvik.vmm.backends.tap import TapBackend

    if config.fds:
        return TapBackend(config.fds)
    if config.ifname:
        return TapBackend.open(config.ifname, config.queues)
    _require_tun()
    from kvik.host.tap import create_tap

    return TapBackend(create_tap(queues=config.queues, mtu=config.mtu or None).fds)


def _require_tun() -> None:
    """Before anything is imported: a confined machine can neither open that nor import."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise HostError(
            f"a tap cannot be made: /dev/net/tun: {error.strerror}",
            errno=error.errno or 0,
            remedy="give the machine an open tap (fds=N); one that runs in the sandbox takes no other",
        ) from error


def make_vsock(config: VsockConfig, name: str) -> VirtioDevice:
    """On the Unix socket `uds`, or else by the kernel's vhost-vsock."""
    if config.uds:
        from kvik.vmm.virtio.vsock import VsockDevice

        return VsockDevice(name, config.cid, config.uds)
    from kvik.vmm.virtio.vsock_vhost import VhostVsockDevice

    return VhostVsockDevice(name, config.cid, fd=config.fd)
