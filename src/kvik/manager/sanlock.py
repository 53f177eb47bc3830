"""Leases that sanlock keeps: on shared storage, renewed by a daemon on each host, which ends machines that lost theirs.

    <lease><lockspace>shop</lockspace><key>db</key><target path='/dev/vg/leases' offset='1048576'/></lease>

Which leases are sanlock's is read where they lie: `sanlock client init` wrote them there. The host's administrator has
joined it to the lockspace (`sanlock client add_lockspace`) and runs the daemon; kvik speaks with that by sanlock's own
program. A machine's VMM is registered with it by being executed through `sanlock client command`, which takes the
leases first: nothing runs without them, and they end with the VMM. sanlock(8).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence

from kvik.conf.devices.other import Lease
from kvik.errors import ConfigError, HostError, KvikError, OperationUnsupported, ResourceBusy
from kvik.host.process import BASE_ENVIRONMENT, find_program
from kvik.host.tools import run

__all__ = ["acquire", "command", "is_sanlocks", "refusal", "release"]

# What its leases begin with, little endian (DELTA_DISK_MAGIC, PAXOS_DISK_MAGIC and PAXOS_DISK_CLEAR of its leader.h).
_MAGIC = (0x12212010, 0x06152010, 0x11282016)
_NAME_LIMIT, _PATH_LIMIT, _LEASES_MAX = 48, 1024, 8  # bytes; SANLK_MAX_RESOURCES: of one process
_DEADLINE = 100.0  # seconds: a lease of a host that died is had after eight times sanlock's own I/O timeout of 10
_SETTINGS = ("SANLOCK_RUN_DIR", "SANLOCK_PRIVILEGED")  # where its daemon listens, of the environment (sanlock(8))
_DONE = re.compile(r"(register|acquire|release) done (-\d+)")
_WHY = {  # its sanlock_rv.h, and errno
    -17: "another machine of this host holds it",
    -243: "a machine of another host holds it",
    -244: "a machine of another host holds it",
    -245: "a machine of another host holds it",
    -28: "this host has not joined its lockspace",
    -223: "no lease of sanlock lies there",
    -226: "it belongs to another lockspace",
    -227: "it has another name",
    -3: "its VMM was started without sanlock: no lease of its document was sanlock's",
    -2: "its daemon does not run",
    -111: "its daemon does not run",
}
_REMEDIES = {
    -28: "join it: sanlock client add_lockspace -s NAME:HOST:PATH:0",
    -223: "make it: sanlock client init -r LOCKSPACE:KEY:PATH:OFFSET",
    -3: "add the lease to the definition (--config) and start the machine anew",
    -2: "start it: systemctl start sanlock",
    -111: "start it: systemctl start sanlock",
}


def is_sanlocks(lease: Lease) -> bool:
    """By the first bytes of where it lies; what cannot be read is not (a lease of ours then says why). Blocks."""
    target = lease.target
    if target is None or not target.path.startswith("/") or (target.offset or 0) >> 62:
        return False
    try:
        fd = os.open(target.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return False
    try:
        data = os.pread(fd, 4, target.offset or 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return len(data) == 4 and struct.unpack("<I", data)[0] in _MAGIC


def command(leases: Sequence[Lease]) -> tuple[str, ...]:
    """The words before a VMM's own command line by which it has these leases. ConfigError, OperationUnsupported."""
    if len(leases) > _LEASES_MAX:
        raise ConfigError(f"a machine can have {_LEASES_MAX} leases of sanlock, not {len(leases)}")
    words = [word for lease in leases for word in ("-r", _resource(lease))]
    settings = [f"{name}={value}" for name, value in _settings().items()]
    through = [_program("env"), *settings] if settings else []
    return (*through, _program("sanlock"), "client", "command", *words, "-c")


def acquire(lease: Lease, pid: int) -> None:
    """For a VMM that was started with leases of sanlock. ResourceBusy, HostError. Blocks."""
    _tell("acquire", lease, pid)


def release(lease: Lease, pid: int) -> None:
    """HostError. Blocks."""
    _tell("release", lease, pid)


def refusal(said: str, leases: Sequence[Lease]) -> KvikError | None:
    """What it means that a VMM that was to be executed through sanlock ended with these words; None: something else."""
    found = [(what, int(code)) for what, code in _DONE.findall(said)]
    return _error(*found[-1], ", ".join(map(_name, leases))) if found else None


def _tell(what: str, lease: Lease, pid: int) -> None:
    done = run(
        [_program("sanlock"), "client", what, "-r", _resource(lease), "-p", str(pid)],
        env={**BASE_ENVIRONMENT, **_settings()},
        timeout=_DEADLINE,
        check=False,
    )
    if error := refusal(done.text + done.message, [lease]):
        raise error
    if done.code:
        raise HostError(f"{_name(lease)}: sanlock failed: {done.message or done.code}")


def _error(what: str, code: int, name: str) -> KvikError:
    why = _WHY.get(code, f"sanlock's {what} ended with {code}")
    kind = ResourceBusy if code in (-17, -243, -244, -245) else HostError
    remedy = _REMEDIES.get(code, "stop that machine, or wait until it has ended" if kind is ResourceBusy else "")
    return kind(f"{name}: {why}", remedy=remedy or "its log says more: sanlock client log_dump")


def _resource(lease: Lease) -> str:
    """LOCKSPACE:NAME:PATH:OFFSET, with what would end a part of it escaped."""
    target = lease.target
    assert target is not None
    parts = (
        ("lockspace", lease.lockspace or "", _NAME_LIMIT),
        ("key", lease.key or "", _NAME_LIMIT),
        ("path", target.path, _PATH_LIMIT - 1),
    )
    for what, text, limit in parts:
        if not text or len(text.encode()) > limit or not text.isprintable():
            raise ConfigError(
                f"{_name(lease)}: sanlock takes no such {what}",
                path="/domain/devices/lease",
                remedy=f"1 to {limit} bytes that can be printed",
            )
    words = [text.replace("\\", "\\\\").replace(":", "\\:") for _, text, _ in parts]
    return ":".join([*words, str(target.offset or 0)])


def _name(lease: Lease) -> str:
    return f"lease '{lease.key}'" + (f" of lockspace '{lease.lockspace}'" if lease.lockspace else "")


def _program(name: str) -> str:
    path = find_program(name)
    if path is None:
        raise OperationUnsupported(f"'{name}' is not installed", remedy="install the package sanlock")
    return path


def _settings() -> dict[str, str]:
    return {name: os.environ[name] for name in _SETTINGS if name in os.environ}
