"""Everything a machine needs open, opened before QEMU starts: what is missing or forbidden is an error that names it,
and QEMU itself needs no right to open anything. What people name may lie on a server that does not answer: it is opened
beside the event loop (`Opened.beside`).

    name              what it is
    monitor           listening socket for QMP, `monitor.sock` in the machine's directory
    chardev:ALIAS     listening socket of a serial line or channel, or its output file
    log:ALIAS         pipe that carries the first line's output to us
    disk:ALIAS:N      image number N of a disk's chain
    disk:ALIAS:overlay  what is written to a transient disk
    kernel, initrd    for direct boot
    loader, nvram     UEFI flash
    net:ALIAS:N       tap queue N (the network's part opened it)
    vhost:ALIAS:N     /dev/vhost-net for queue N
    vsock:ALIAS       /dev/vhost-vsock
    tpm:ALIAS         control channel of swtpm
    fs:ALIAS          connection to virtiofsd
    passt:ALIAS       connection to passt
    switch:ALIAS      where a network's switch in user space connects (QEMU), or the connection (kvik-vmm)
    vublk:ALIAS       connection to a disk's vhost-user back end
    life:ALIAS        what that back end ends with
    lease:N           a lease's lock, which is held for as long as it is open
    state             connection by which kvik-vmm is filled with a saved machine
    secret:ALIAS:N:.. a file in memory with a passphrase or password
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Concatenate, ParamSpec

from kvik.conf.devices.chardev import Chardev, ChardevSource
from kvik.conf.devices.disk import BackingStore, Disk, DiskSource, Format
from kvik.conf.devices.other import Cid, Vsock
from kvik.conf.domain import Domain
from kvik.errors import ConfigError, ConfigUnsupported, HostError
from kvik.host import files as host_files
from kvik.host.filesystem import shared_as
from kvik.host.reach import about, closer, obtain
from kvik.hypervisor.chain import check_meant, check_qcow2, qcow2_backing
from kvik.hypervisor.firmware import make_variables
from kvik.hypervisor.layers import Layer, has_medium, layers
from kvik.hypervisor.names import (
    MONITOR,
    TAP_TYPES,
    alias_of,
    character_devices,
    chardev_name,
    first_output,
    image_name,
    listens,
    log_name,
    tap_name,
    vhost_name,
)
from kvik.hypervisor.overlay import open_overlay
from kvik.hypervisor.secrets import SECRET_PREFIX, encryption_of, own_secrets
from kvik.hypervisor.secrets import check_image as check_encrypted
from kvik.image.lock import check_image, lock_for_hosts
from kvik.qmp.aio import short_unix_path

__all__ = [
    "Opened",
    "connected_listener",
    "listen_unix",
    "open_all",
    "open_chardev",
    "open_disk",
    "open_vsock",
    "with_paths",
]

_MAX_CHAIN = 200
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
_FIRST_CID = 3
_ON_STORAGE = ("disk:", "kernel", "initrd", "loader", "nvram")
P = ParamSpec("P")


class Opened:
    """Descriptors by name. `close` closes them, in any case; `undo` removes what only a running machine needs."""

    def __init__(
        self, close: ExitStack, undo: ExitStack, passed: Mapping[str, int], bases: Collection[str] = ()
    ) -> None:
        """`bases`: where raw images may lie that only headers name (`chain.check_meant`)."""
        self.bases = bases
        self.fds: dict[str, int] = {}
        self.close = close
        self.undo = undo
        self.output: int | None = None  # our end of the first line's pipe
        self.made: list[Path] = []  # sockets to remove when the machine is gone
        self.passed: dict[str, int] = {}  # our own of the rest: the caller's may be gone when they are asked for
        self.next_index = 1  # of the next image: unique in the machine, as libvirt numbers them
        for name, fd in passed.items():
            if name.startswith(("net:", "vhost:", "switch:", "vdpa:", "tpm:", "fs:", "lease:", SECRET_PREFIX)):
                self.add(name, os.dup(fd))
            else:
                self.passed[name] = os.dup(fd)
                self.close.callback(os.close, self.passed[name])

    async def beside(self, work: Callable[Concatenate[Opened, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """`work(self, ...)` in a thread, as `host.reach` does it. On an error it leaves nothing open, and `self` is of
        no use any more."""
        close, undo = self.close, self.undo
        self.close, self.undo = ExitStack(), ExitStack()  # theirs, for a thread that comes too late closes its own
        mine = ExitStack()
        mine.push(self.undo)
        mine.push(self.close)

        def all_of_it() -> None:
            try:
                work(self, *args, **kwargs)
            except BaseException:
                mine.close()
                raise

        await obtain(lambda _: mine.close(), all_of_it)
        close.push(self.close)
        undo.push(self.undo)
        self.close, self.undo = close, undo

    def add(self, name: str, fd: int) -> None:
        self.fds[name] = fd
        self.close.callback(closer(fd) if name.startswith(_ON_STORAGE) else os.close, fd)

    def index(self) -> int:
        self.next_index += 1
        return self.next_index - 1

    def paths(self) -> dict[int, str]:
        """Descriptor -> file, for messages: QEMU knows its images by number only."""
        found = {}
        for name, fd in self.fds.items():
            if name.startswith("disk:"):
                with contextlib.suppress(OSError):
                    found[fd] = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        return found

    def drop_output(self) -> None:
        if self.output is not None:
            os.close(self.output)
            self.output = None

    def open(self, name: str, path: str, flags: int) -> int:
        about(path)
        try:
            fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise host_files.host_error("open", path, error) from error
        self.add(name, fd)
        return fd


async def open_all(
    domain: Domain,
    directory: Path,
    passed: Mapping[str, int],
    kernel: str | None,
    *,
    bases: Collection[str],
    close: ExitStack,
    undo: ExitStack,
) -> Opened:
    """`kernel` replaces the document's (the unpacked one). Writes found chains and socket paths into the document."""
    opened = Opened(close, undo, passed, bases)
    await opened.beside(_open_all, domain, directory, kernel)
    return opened


def _open_all(opened: Opened, domain: Domain, directory: Path, kernel: str | None) -> None:
    # What may stand still comes first: until then there is nothing that another start would find in its way.
    for disk in reversed(domain.devices.disks):  # libvirt numbers from the last disk
        open_disk(opened, disk)
    _open_boot(opened, domain, kernel)
    _listen(opened, MONITOR, directory / "monitor.sock")
    for device in character_devices(domain):
        open_chardev(opened, device, directory)
    first = first_output(domain)
    if first is not None and first.log is None:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writer, True)
        opened.add(log_name(alias_of(first)), writer)
        opened.output = reader
        opened.undo.callback(opened.drop_output)
    _open_networks(opened, domain)
    if domain.devices.vsock is not None:
        open_vsock(opened, domain.devices.vsock)


def with_paths(text: str, paths: Mapping[int, str]) -> str:
    """What QEMU said, with the files' own names instead of its fdsets'."""
    return re.sub(r"/dev/fdset/(\d+)", lambda match: paths.get(int(match[1]), match[0]), text)


def listen_unix(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening socket in place of a stale one. Raises `HostError`; never removes what is no socket."""
    about(path)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), mode)  # the file takes the socket's mode: it is never open to others
        with short_unix_path(path) as name:
            sock.bind(name)
        sock.listen(1)
    except OSError as error:
        sock.close()
        raise host_files.host_error("listen on", path, error) from error
    return sock


def connected_listener(path: Path) -> tuple[socket.socket, socket.socket]:
    """A socket that listens and the one connection that waits on it; its path is gone before anybody else could use it.

    Raises `HostError`.
    """
    listening = listen_unix(path)
    client = socket.socket(socket.AF_UNIX)
    try:
        with short_unix_path(path) as short:
            client.connect(short)
    except OSError as error:
        listening.close()
        client.close()
        raise host_files.host_error("connect to", path, error) from error
    finally:
        path.unlink(missing_ok=True)
    return listening, client


def _listen(opened: Opened, name: str, path: Path) -> None:
    sock = listen_unix(path)
    opened.made.append(path)
    opened.undo.callback(path.unlink, missing_ok=True)
    opened.add(name, sock.detach())


def open_chardev(opened: Opened, device: Chardev, directory: Path) -> None:
    alias = alias_of(device)
    if listens(device):
        source = device.source
        if source is None:
            source = ChardevSource(mode="bind")
            device.sources = [source]
        if not source.path:
            source.path = str(directory / f"{alias}.sock")
        source.mode = source.mode or "bind"
        _listen(opened, chardev_name(alias), Path(source.path))
    elif device.type == "file" and device.source is not None and device.source.path:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if device.source.append else os.O_TRUNC)
        opened.open(chardev_name(alias), device.source.path, flags | os.O_NOFOLLOW)
    if device.log is not None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        # Always for appending, so that the manager can cut a log that grows under QEMU's hands.
        flags |= os.O_APPEND | (os.O_TRUNC if device.log.append is False else 0)
        opened.open(log_name(alias), device.log.file, flags)


# -- disks


def open_disk(opened: Opened, disk: Disk) -> None:
    """Opens every image of the chain and numbers it; a chain that the document does not name is read from qcow2
    headers. Afterwards the document has the chain in full, with its end."""
    if not has_medium(disk):
        return
    if disk.type in ("file", "block") and _optional_and_missing(disk):
        disk.source = None
        return
    own_secrets(disk)
    alias = alias_of(disk)
    above: Disk | BackingStore = disk
    last: Layer | None = None
    for layer in list(layers(disk)):
        if layer.number:
            assert above.backing_store is not None
            above = above.backing_store
        _set_index(above, opened.index())
        if layer.type in ("file", "block"):  # others QEMU reaches by protocol
            fd = _open_image(opened, image_name(alias, layer.number), layer.source, layer.read_only, disk.shareable)
            _check_kind(fd, layer, disk)
            if layer.format == "qcow2":
                check_qcow2(fd, layer.source.location or f"disk {disk.target.dev}")
            check_encrypted(fd, layer, encryption_of(disk, layer), f"disk {disk.target.dev}")
        last = layer
    if disk.transient is not None:
        open_overlay(opened, disk)
    if above.backing_store is not None or last is None:
        return
    if last.format == "qcow2" and last.type in ("file", "block"):
        above = _open_below(opened, disk, above, last.number)
    above.backing_store = BackingStore()  # the end


def _open_below(opened: Opened, disk: Disk, above: Disk | BackingStore, number: int) -> Disk | BackingStore:
    """Follows qcow2 headers down from image `number` of the chain, which `above` describes; the last image."""
    alias = alias_of(disk)
    while above.source is not None and above.source.location:
        found = qcow2_backing(opened.fds[image_name(alias, number)], above.source.location)
        if found is None:
            break
        number += 1
        if number > _MAX_CHAIN:
            raise ConfigUnsupported(f"disk {disk.target.dev}: its chain is longer than {_MAX_CHAIN} images")
        try:
            fd = _open_image(opened, image_name(alias, number), DiskSource(file=found.path), True)
        except HostError as error:
            raise HostError(
                f"disk {disk.target.dev}: {above.source.location} sits on {found.path}: {error.message}",
                errno=error.errno,
                remedy=error.remedy or "bring that image back, or name where it is now in <backingStore>",
            ) from error
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(f"disk {disk.target.dev}: {found.path} is neither a file nor a block device")
        block = stat.S_ISBLK(mode)
        check_meant(found, above.source.location, opened.bases, block=block)
        source = DiskSource(dev=found.path) if block else DiskSource(file=found.path)
        below = BackingStore(type="block" if block else "file", format=Format(type=found.format), source=source)
        _set_index(below, opened.index())
        above.backing_store = below
        above = below
        if found.format != "qcow2":
            break
    return above


def _set_index(image: Disk | BackingStore, index: int) -> None:
    if isinstance(image, BackingStore):
        image.index = index
    elif image.source is not None:
        image.source.index = index


def _optional_and_missing(disk: Disk) -> bool:
    source = disk.source
    if source is None or source.startup_policy != "optional" or not source.location:
        return False
    about(source.location)
    return not Path(source.location).exists()


def _open_image(opened: Opened, name: str, source: DiskSource, read_only: bool, shareable: bool = False) -> int:
    about(source.location or source.fdgroup or "")
    if source.fdgroup:
        passed = opened.passed.get(source.fdgroup)
        if passed is None:
            raise ConfigError(f"no descriptor was passed for the fdgroup {source.fdgroup!r}")
        opened.add(name, os.dup(passed))
        return opened.fds[name]
    assert source.location
    fd = opened.open(name, source.location, (os.O_RDONLY | os.O_NONBLOCK) if read_only else os.O_RDWR)
    if shared_as(fd):
        # Who has it open on another host is said before a VMM finds it locked; and where that could not, held off.
        check_image(fd, source.location, write=not read_only, share_write=shareable)
        lock_for_hosts(fd, source.location, write=not read_only, share_write=shareable)
    return fd


def _check_kind(fd: int, layer: Layer, disk: Disk) -> None:
    mode = os.fstat(fd).st_mode
    if layer.type == "file" and not stat.S_ISREG(mode):
        raise ConfigError(
            f"disk {disk.target.dev}: {layer.source.location} is no regular file",
            remedy="use <disk type='block'> for a block device",
        )
    if layer.type == "block" and not stat.S_ISBLK(mode):
        raise ConfigError(f"disk {disk.target.dev}: {layer.source.location} is no block device")


# -- boot files


def _open_boot(opened: Opened, domain: Domain, kernel: str | None) -> None:
    described = domain.os
    if described.kernel:
        _regular(opened, "kernel", kernel or described.kernel)
        if described.initrd:
            _regular(opened, "initrd", described.initrd)
    loader = described.loader
    if loader is not None and loader.value and loader.type == "pflash":
        opened.open("loader", loader.value, os.O_RDONLY if loader.readonly is not False else os.O_RDWR)
        nvram = described.nvram
        path = ((nvram.source.location if nvram.source else None) or nvram.value) if nvram else None
        if nvram is not None and path:
            make_variables(path, nvram.template)
            opened.open("nvram", path, os.O_RDWR)


def _regular(opened: Opened, name: str, path: str) -> None:
    fd = opened.open(name, path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ConfigError(f"the {name} {path} is no regular file", path=f"/domain/os/{name}")


# -- network, vsock


def _open_networks(opened: Opened, domain: Domain) -> None:
    for nic in domain.devices.interfaces:
        if nic.type not in TAP_TYPES:
            continue
        alias = alias_of(nic)
        model = nic.model.type if nic.model else "virtio"
        backend = nic.driver.name if nic.driver else None
        if not model.startswith("virtio") or backend == "qemu" or (domain.type != "kvm" and backend != "vhost"):
            continue
        queues = sum(1 for name in opened.fds if name.startswith(f"{tap_name(alias)}:"))
        path = (nic.backend.vhost if nic.backend else None) or "/dev/vhost-net"
        for number in range(queues):
            name = f"{vhost_name(alias)}:{number}"
            if name in opened.fds:
                continue
            try:
                opened.open(name, path, os.O_RDWR)
            except HostError:
                if backend == "vhost":
                    raise
                break  # an accelerator, not a need


def open_vsock(opened: Opened, device: Vsock) -> None:
    """The CID is claimed here, where a taken one can be told from other errors (and another tried)."""
    try:
        fd = opened.open(f"vsock:{alias_of(device)}", "/dev/vhost-vsock", os.O_RDWR)
    except HostError as error:
        if error.errno == errno.ENOENT:
            raise HostError(
                "a vsock needs the kernel's vhost_vsock: /dev/vhost-vsock does not exist",
                errno=errno.ENOENT,
                remedy="modprobe vhost_vsock; a kernel without that module has no vsock for machines",
            ) from error
        raise
    wanted = device.cid.address if device.cid and not device.cid.auto else None
    for cid in [wanted] if wanted is not None else range(_FIRST_CID, _FIRST_CID + 65536):
        try:
            fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and wanted is None:
                continue
            raise HostError(f"cannot use vsock CID {cid}: {error.strerror}", errno=error.errno or 0) from error
        device.cid = Cid(auto=device.cid.auto if device.cid else True, address=cid)
        return
