"""The command kvik-blk: a disk's images, from the guest's down, as open descriptors, served to one VMM.

    kvik-blk --image=5,qcow2 --image=6,raw --socket=7 --monitor=8 --life=9 --id=virtio-disk0 ...

    --image=FD,FORMAT     raw or qcow2; the first is the one the guest writes to, the others lie below it, in order
    --socket=FD           a socket that listens, or a connection: vhost-user
    --monitor=FD          a socket that listens, for QMP
    --redo=FD             a file on a tmpfs where changes of tables are noted, for the process that comes after this one
    --life=FD             a socket whose other end's closing ends the process, in order
    --node=NAME           what the first image is called, if it came on top while the machine ran
    --id=NAME, --serial=TEXT, --queues=N, --queue-size=N, --block-size=BYTES
    --cache=MODE          writeback, none, writethrough, directsync or unsafe
    --read-only, --share, --no-discard, --no-lock
    --sandbox=on|log|off

Exit codes: 0 it was ended in order, 1 it could not start or finish, 3 it found a fault of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from kvik.errors import HostError, InvalidArgument, KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.image.qcow2.redo import Redo
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.blk.host import BlkHost
    from kvik.vmm.virtio.blk import Blk

__all__ = ["main"]

NAME = "kvik-blk"
_FLAGS = ("read-only", "share", "no-discard", "no-lock")
_NUMBERS = {"socket": -1, "monitor": -1, "life": -1, "redo": -1, "queues": 1, "queue-size": 256, "block-size": 0}
_TEXTS = {"id": "disk0", "node": "", "serial": "", "cache": "writeback", "sandbox": "on"}
_MAX_LAYERS = 200


class Options:
    """The command line, checked. Raises `InvalidArgument`."""

    def __init__(self, words: list[str]) -> None:
        self.images: list[tuple[int, str]] = []
        self.flags: set[str] = set()
        self.numbers = dict(_NUMBERS)
        self.texts = dict(_TEXTS)
        for word in words:
            name, _, value = word.removeprefix("--").partition("=")
            if name == "image":
                fd, _, form = value.partition(",")
                if form not in ("raw", "qcow2"):
                    raise InvalidArgument(f"{word}: the format is raw or qcow2")
                self.images.append((_number(word, fd), form))
            elif name in self.numbers:
                self.numbers[name] = _number(word, value)
            elif name in self.texts:
                self.texts[name] = value
            elif name in _FLAGS and word == f"--{name}":
                self.flags.add(name)
            else:
                raise InvalidArgument(f"unknown option {word}")
        if not 0 < len(self.images) <= _MAX_LAYERS or self.numbers["socket"] < 0:
            raise InvalidArgument(f"needs --socket and 1 to {_MAX_LAYERS} times --image")

    @property
    def descriptors(self) -> set[int]:
        return {fd for fd, _ in self.images} | {self.numbers[name] for name in ("socket", "monitor", "life", "redo")}


def _number(word: str, value: str) -> int:
    if not value.isdecimal() or len(value) > 9:
        raise InvalidArgument(f"{word}: not a number")
    return int(value)


def main(words: list[str]) -> int:
    from kvik.vmm.sandbox import close_stray, isolation

    try:
        options = Options(words)
        close_stray(options.descriptors - {-1})
        isolation.leave_namespaces()
        _name_process()
        host, device = build(options)
    except (KvikError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: host.quit())
    try:
        _confine(options, device)
        code = host.run()
    except (KvikError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        code = 1
    try:
        host.close()
    except (KvikError, OSError) as error:
        print(f"{NAME}: what the guest wrote last may be lost: {error}", file=sys.stderr)
        code = 1
    return code


def build(options: Options) -> tuple[BlkHost, Blk]:
    """Everything that is opened, bound and imported, before the sandbox. Raises `KvikError`, OSError."""
    from kvik.vmm.blk.backups import Backups
    from kvik.vmm.blk.block_jobs import BlockJobs
    from kvik.vmm.blk.host import BlkHost
    from kvik.vmm.blk.overlay import Overlays
    from kvik.vmm.virtio.blk import Blk

    host = BlkHost()
    redo = _redo(options)
    image = _open(options, host, redo)
    if redo is not None:
        redo.begin(image.fd)
    numbers = options.numbers
    device = Blk(
        options.texts["id"],
        image,
        serial=options.texts["serial"],
        queues=numbers["queues"],
        queue_size=numbers["queue-size"],
        werror="report",
        loop=host.loop,
    )
    if numbers["block-size"]:
        device.config["blk_size"] = numbers["block-size"]
    inner = getattr(image, "image", None)
    if inner is not None and inner.format == "qcow2":
        device.config["discard_sector_alignment"] = inner.cluster_size // 512
    locking = "no-lock" not in options.flags
    host.overlays = device.overlays = Overlays(
        device, locking=locking, log=host.log, redo=redo, top=options.texts["node"]
    )
    host.backups = Backups(device, host.emit, locking=locking, log=host.log)
    device.block_jobs = BlockJobs(device, host.overlays, host.backups, host.emit, locking=locking, log=host.log)
    if numbers["monitor"] >= 0:
        from kvik.vmm.blk.monitor import COMMANDS
        from kvik.vmm.monitor.server import MonitorServer

        server = MonitorServer(host, package=NAME, commands=COMMANDS)  # type: ignore[arg-type]  # quacks like a machine
        server.adopt(numbers["monitor"])
    if numbers["life"] >= 0:
        life = socket.socket(fileno=numbers["life"])
        life.setblocking(False)
        host.loop.add_reader(life.fileno(), host.quit)  # nothing is ever sent there
        host.life = life
    host.serve(device, socket.socket(fileno=numbers["socket"]))
    return host, device


def _redo(options: Options) -> Redo | None:
    if options.numbers["redo"] < 0 or "read-only" in options.flags:
        return None
    from kvik.image.qcow2.redo import Redo
    from kvik.vmm.blk.chain import check_redo

    redo = Redo(options.numbers["redo"])
    check_redo(redo, options.images)
    return redo


def _open(options: Options, host: BlkHost, redo: Redo | None) -> BlockImage:
    from kvik.image.lock import lock_image
    from kvik.vmm.backends.block import CACHE_MODES, BlockImage
    from kvik.vmm.blk.chain import name_of, open_chain
    from kvik.vmm.blk.image import FormatImage

    read_only = "read-only" in options.flags
    settings: dict[str, Any] = {
        "read_only": read_only,
        "cache": options.texts["cache"],
        "discard": "no-discard" not in options.flags,
        "locking": "no-lock" not in options.flags,
        "share_write": "share" in options.flags,
        "name": name_of(options.images[0][0]),
    }
    top, form = options.images[0]
    if form == "raw" and len(options.images) == 1:
        return BlockImage(top, image_format="raw", **settings)
    if CACHE_MODES.get(options.texts["cache"], (False,))[0]:
        # O_DIRECT is the open file's: tables are read and written through one, data through the other.
        data = os.open(f"/proc/self/fd/{top}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    else:
        data = os.dup(top)
    try:
        if settings["locking"]:  # before it is opened: that repairs one that was not closed
            lock_image(data, settings["name"], write=not read_only, share_write=settings["share_write"])
        image = open_chain(options.images, read_only=read_only, locking=settings["locking"], redo=redo)
    except BaseException:
        os.close(data)
        raise
    settings["locking"] = False
    return FormatImage(image, data, log=host.log, **settings)


def _name_process() -> None:
    try:
        with open("/proc/self/comm", "w") as file:  # noqa: PTH123 - pathlib is not imported
            file.write(NAME)
    except OSError:
        pass


def _confine(options: Options, device: Blk) -> None:
    """HostError where the kernel refuses."""
    mode = options.texts["sandbox"]
    if mode == "off":
        return
    from kvik.vmm import sandbox
    from kvik.vmm.confinement import MODES, import_all

    if mode not in MODES:
        raise InvalidArgument(f"there is no sandbox {mode!r}", remedy="use on, log or off")
    import_all(LATE)
    try:
        sandbox.enter("blk", sandbox.Policy(MODES[mode], descriptors=1024))
    except OSError as error:
        raise HostError(
            f"the sandbox cannot be entered: {error.strerror}",
            errno=error.errno or 0,
            remedy="this kernel lacks seccomp, or forbids it",
        ) from error


# Imported inside functions that run in the sandbox, where no file can be opened.
LATE = (
    "encodings.ascii",
    "json",
    "kvik.image.create",
    "kvik.image.fallocate",
    "kvik.image.layers",
    "kvik.image.qcow2.preallocate",
    "kvik.image.qcow2.reader",
    "kvik.image.qcow2.redo",
    "kvik.image.qcow2.refcount",
    "kvik.image.qcow2.resize",
    "kvik.image.qcow2.snapshots",
    "kvik.image.qcow2.tracking",
    "kvik.image.qcow2.writer",
    "kvik.image.raw",
    "kvik.image.rebase",
    "kvik.image.resize",
    "kvik.image.zstd",
    "kvik.vmm.blk.active_commit",
    "kvik.vmm.blk.block_copy",
    "kvik.vmm.blk.commit",
    "kvik.vmm.blk.pull",
    "linecache",
    "traceback",
)
