"""What the guest's agent is asked: time, host name, file systems, users, addresses.

Everything an agent says is a guest's word: of any shape and size. Wrong shapes are an `AgentError`, lists are cut at
the protocol's limits.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from kvik.conf.enums import DomainGuestInfoTypes as Types
from kvik.daemon.handlers.common import BOOLEAN, INT, STRING, UINT, ULLONG, check_flags, require_active
from kvik.errors import AgentError, InvalidArgument, OperationUnsupported
from kvik.rpc.xdr_types import TypedParam

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.domain import DomainObject

NANO = 1_000_000_000
LIST_MAX = 256  # file systems, disks of one, ...
PARAMS_MAX = 2048  # REMOTE_DOMAIN_GUEST_INFO_PARAMS_MAX
AGENT_TIMEOUT = 5.0
FREEZE_TIMEOUT = 60.0


async def ask(domain: DomainObject, command: str, timeout: float = AGENT_TIMEOUT, **arguments: Any) -> Any:
    """The agent's answer to one command."""
    require_active(domain)
    request: dict[str, Any] = {"execute": command}
    if arguments:
        request["arguments"] = arguments
    text = await domain.agent_command(msgspec.json.encode(request).decode(), timeout=timeout)
    try:
        answer = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise AgentError(f"the agent of machine '{domain.name}' answered {command} with no JSON") from error
    if not isinstance(answer, dict) or "return" not in answer:
        raise AgentError(f"the agent of machine '{domain.name}' answered {command} with an error: {text[:200]}")
    return answer["return"]


def _dicts(value: Any) -> list[dict[str, Any]]:
    """The dictionaries in a list that a guest sent, at most LIST_MAX."""
    return [item for item in value if isinstance(item, dict)][:LIST_MAX] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return str(value)[:4096].replace("\0", "") if value is not None else ""


def _number(value: Any, top: int = 2**63 - 1) -> int:
    return min(max(value, 0), top) if isinstance(value, int) else 0


async def get_time(connection: Connection, args: Any) -> tuple[int, int]:
    check_flags(args[1], 0, "guest time")
    now = _number(await ask(connection.domain(args[0]), "guest-get-time"))
    return (now // NANO, now % NANO)


async def set_time(connection: Connection, args: Any) -> None:
    reference, seconds, nanoseconds, flags = args
    check_flags(flags, 1, "guest time")
    domain = connection.domain(reference)
    if flags & 1:  # VIR_DOMAIN_TIME_SYNC: from the machine's own clock
        await ask(domain, "guest-set-time")
    else:
        await ask(domain, "guest-set-time", time=seconds * NANO + nanoseconds)


async def get_hostname(connection: Connection, args: Any) -> tuple[str]:
    check_flags(args[1], 3, "guest host name")
    if args[1] & 1:
        raise OperationUnsupported("host names are not known from leases here", remedy="ask the agent")
    answer = await ask(connection.domain(args[0]), "guest-get-host-name")
    return (_text(answer.get("host-name")) if isinstance(answer, dict) else "",)


def _aliases(domain: DomainObject, disks: Any) -> list[str]:
    """The targets of the machine's disks that a guest's file system lies on, as far as they can be told."""
    document = domain.live
    known: dict[tuple[Any, ...], str] = {}
    serials: dict[str, str] = {}
    for disk in document.devices.disks if document is not None else ():
        target = getattr(disk.target, "dev", None)
        address = disk.address
        if not target:
            continue
        serial = getattr(disk, "serial", None)
        if serial:
            serials[serial] = target
        if address is not None and address.type == "pci":
            known["pci", address.domain or 0, address.bus or 0, address.slot or 0, address.function or 0] = target
        elif address is not None and address.type == "drive":
            known["drive", address.bus or 0, address.target or 0, address.unit or 0] = target
    found = []
    for entry in _dicts(disks):
        pci = entry.get("pci-controller")
        place: tuple[Any, ...] = ()
        if isinstance(pci, dict) and entry.get("bus-type") == "virtio":
            place = ("pci", *(_number(pci.get(key)) for key in ("domain", "bus", "slot", "function")))
        else:
            place = ("drive", *(_number(entry.get(key)) for key in ("bus", "target", "unit")))
        target = serials.get(_text(entry.get("serial"))) or known.get(place)
        if target:
            found.append(target)
    return found


async def get_fsinfo(connection: Connection, args: Any) -> tuple[list[Any], int]:
    check_flags(args[1], 0, "guest file systems")
    domain = connection.domain(args[0])
    rows = [
        (
            _text(entry.get("mountpoint")),
            _text(entry.get("name")),
            _text(entry.get("type")),
            _aliases(domain, entry.get("disk")),
        )
        for entry in _dicts(await ask(domain, "guest-get-fsinfo"))
    ]
    return (rows, len(rows))


async def freeze(connection: Connection, args: Any) -> tuple[int]:
    reference, mountpoints, flags = args
    check_flags(flags, 0, "file system freeze")
    domain = connection.domain(reference)
    if mountpoints:
        count = await ask(domain, "guest-fsfreeze-freeze-list", FREEZE_TIMEOUT, mountpoints=mountpoints)
    else:
        count = await ask(domain, "guest-fsfreeze-freeze", FREEZE_TIMEOUT)
    return (_number(count, 2**31 - 1),)


async def thaw(connection: Connection, args: Any) -> tuple[int]:
    check_flags(args[2], 0, "file system thaw")
    count = await ask(connection.domain(args[0]), "guest-fsfreeze-thaw", FREEZE_TIMEOUT)
    return (_number(count, 2**31 - 1),)


async def trim(connection: Connection, args: Any) -> None:
    reference, mountpoint, minimum, flags = args
    check_flags(flags, 0, "file system trim")
    if mountpoint:
        raise OperationUnsupported("the agent trims all file systems or none", remedy="leave the mount point out")
    await ask(connection.domain(reference), "guest-fstrim", FREEZE_TIMEOUT, minimum=minimum)


async def set_user_password(connection: Connection, args: Any) -> None:
    reference, user, password, flags = args
    check_flags(flags, 1, "user password")
    if not user or password is None:
        raise InvalidArgument("a user and a password are needed")
    await ask(
        connection.domain(reference),
        "guest-set-user-password",
        username=user,
        password=base64.b64encode(password.encode()).decode(),
        crypted=bool(flags & 1),
    )


# --- guest information ------------------------------------------------------------------------------------------------


def _users(domain: DomainObject, answer: Any) -> Iterator[TypedParam]:
    users = _dicts(answer)
    yield TypedParam("user.count", UINT, len(users))
    for index, user in enumerate(users):
        yield TypedParam(f"user.{index}.name", STRING, _text(user.get("user")))
        if user.get("domain"):
            yield TypedParam(f"user.{index}.domain", STRING, _text(user["domain"]))
        login = user.get("login-time")
        yield TypedParam(
            f"user.{index}.login-time", ULLONG, int(login * 1000) if isinstance(login, int | float) and login > 0 else 0
        )


def _os(domain: DomainObject, answer: Any) -> Iterator[TypedParam]:
    for key in ("id", "name", "pretty-name", "version", "version-id", "machine", "variant", "variant-id"):
        if isinstance(answer, dict) and answer.get(key):
            yield TypedParam(f"os.{key}", STRING, _text(answer[key]))
    for key in ("kernel-release", "kernel-version"):
        if isinstance(answer, dict) and answer.get(key):
            yield TypedParam(f"os.{key}", STRING, _text(answer[key]))


def _timezone(domain: DomainObject, answer: Any) -> Iterator[TypedParam]:
    if isinstance(answer, dict):
        if answer.get("zone"):
            yield TypedParam("timezone.name", STRING, _text(answer["zone"]))
        offset = answer.get("offset")
        if isinstance(offset, int) and abs(offset) < 1 << 20:
            yield TypedParam("timezone.offset", INT, offset)


def _hostname(domain: DomainObject, answer: Any) -> Iterator[TypedParam]:
    if isinstance(answer, dict):
        yield TypedParam("hostname", STRING, _text(answer.get("host-name")))


def _file_systems(domain: DomainObject, answer: Any) -> Iterator[TypedParam]:
    entries = _dicts(answer)
    yield TypedParam("fs.count", UINT, len(entries))
    for index, entry in enumerate(entries):
        prefix = f"fs.{index}."
        yield TypedParam(prefix + "name", STRING, _text(entry.get("name")))
        yield TypedParam(prefix + "mountpoint", STRING, _text(entry.get("mountpoint")))
        yield TypedParam(prefix + "fstype", STRING, _text(entry.get("type")))
        for key in ("total-bytes", "used-bytes"):
            if isinstance(entry.get(key), int):
                yield TypedParam(prefix + key, ULLONG, _number(entry[key]))
        disks = _aliases(domain, entry.get("disk"))
        yield TypedParam(prefix + "disk.count", UINT, len(disks))
        for number, alias in enumerate(disks):
            yield TypedParam(f"{prefix}disk.{number}.alias", STRING, alias)


def _disks(domain: DomainObject, answer: Any) -> Iterator[TypedParam]:
    entries = _dicts(answer)
    yield TypedParam("disk.count", UINT, len(entries))
    for index, entry in enumerate(entries):
        yield TypedParam(f"disk.{index}.name", STRING, _text(entry.get("name")))
        yield TypedParam(f"disk.{index}.partition", BOOLEAN, int(bool(entry.get("partition"))))
        if entry.get("alias"):
            yield TypedParam(f"disk.{index}.guest_alias", STRING, _text(entry["alias"]))


def _interfaces(domain: DomainObject, answer: Any) -> Iterator[TypedParam]:
    entries = _dicts(answer)
    yield TypedParam("if.count", UINT, len(entries))
    for index, entry in enumerate(entries):
        prefix = f"if.{index}."
        yield TypedParam(prefix + "name", STRING, _text(entry.get("name")))
        if entry.get("hardware-address"):
            yield TypedParam(prefix + "hwaddr", STRING, _text(entry["hardware-address"]))
        addresses = _dicts(entry.get("ip-addresses"))
        yield TypedParam(prefix + "addr.count", UINT, len(addresses))
        for number, address in enumerate(addresses):
            yield TypedParam(f"{prefix}addr.{number}.type", STRING, _text(address.get("ip-address-type")))
            yield TypedParam(f"{prefix}addr.{number}.addr", STRING, _text(address.get("ip-address")))
            yield TypedParam(f"{prefix}addr.{number}.prefix", UINT, _number(address.get("prefix"), 128))


# virDomainGuestInfoTypes -> (agent command, what it comes to)
INFORMATION = {
    Types.USERS: ("guest-get-users", _users),
    Types.OS: ("guest-get-osinfo", _os),
    Types.TIMEZONE: ("guest-get-timezone", _timezone),
    Types.HOSTNAME: ("guest-get-host-name", _hostname),
    Types.FILESYSTEM: ("guest-get-fsinfo", _file_systems),
    Types.DISKS: ("guest-get-disks", _disks),
    Types.INTERFACES: ("guest-network-get-interfaces", _interfaces),
}


async def get_guest_info(connection: Connection, args: Any) -> tuple[list[TypedParam]]:
    """What was asked for must be had; asked for nothing in particular, what the agent cannot tell is left out."""
    reference, types, flags = args
    check_flags(flags, 0, "guest information")
    unknown = types & ~Types.mask()
    if unknown:
        raise InvalidArgument(f"unknown types of guest information (0x{unknown:x})")
    domain = connection.domain(reference)
    require_active(domain)
    params: list[TypedParam] = []
    failure: AgentError | None = None
    for bit, (command, collect) in INFORMATION.items():
        if types and not types & bit:
            continue
        try:
            answer = await ask(domain, command)
        except AgentError as error:
            if types:
                raise
            failure = error
            continue
        params.extend(collect(domain, answer))
    if not params and failure is not None:
        raise failure
    return (params[:PARAMS_MAX],)
