"""Machines: finding, listing, looking at them, and their life cycle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.enums import ConnectListAllDomainsFlags as ListFlags
from kvik.conf.enums import (
    DomainCreateFlags,
    DomainDefineFlags,
    DomainDestroyFlags,
    DomainState,
    DomainUndefineFlags,
    DomainXMLFlags,
)
from kvik.daemon.dispatch import Access
from kvik.daemon.errors import OperationDenied
from kvik.daemon.handlers.common import LIST_MAX, check_flags, reference, references, require_active
from kvik.errors import InvalidArgument, OperationInvalid, OperationUnsupported
from kvik.manager.backup import job as backup_job

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.domain import DomainObject

# --- finding ----------------------------------------------------------------------------------------------------------


def lookup_by_name(connection: Connection, args: Any) -> tuple[Any]:
    return (reference(connection.manager.lookup_name(args[0])),)


def lookup_by_uuid(connection: Connection, args: Any) -> tuple[Any]:
    return (reference(connection.manager.lookup_uuid(args[0])),)


def lookup_by_id(connection: Connection, args: Any) -> tuple[Any]:
    return (reference(connection.manager.lookup_id(args[0])),)


def _filter(flags: int) -> Any:
    """virConnectListAllDomainsFlags -> whether a machine is wanted. Within a group any, between groups all."""
    tests = []
    for yes, no, value in (
        (ListFlags.ACTIVE, ListFlags.INACTIVE, lambda domain: domain.id >= 0),
        (ListFlags.PERSISTENT, ListFlags.TRANSIENT, lambda domain: domain.persistent),
        (ListFlags.AUTOSTART, ListFlags.NO_AUTOSTART, lambda domain: domain.autostart),
        (ListFlags.MANAGEDSAVE, ListFlags.NO_MANAGEDSAVE, lambda domain: domain.has_managed_save),
        (ListFlags.HAS_SNAPSHOT, ListFlags.NO_SNAPSHOT, lambda domain: len(domain.snapshots) > 0),
        (ListFlags.HAS_CHECKPOINT, ListFlags.NO_CHECKPOINT, lambda domain: len(domain.checkpoints) > 0),
    ):
        chosen = flags & (yes | no)
        if chosen == yes:
            tests.append(value)
        elif chosen == no:
            tests.append(lambda domain, value=value: not value(domain))
    states = flags & (ListFlags.RUNNING | ListFlags.PAUSED | ListFlags.SHUTOFF | ListFlags.OTHER)
    if states:
        named = {
            DomainState.RUNNING: ListFlags.RUNNING,
            DomainState.PAUSED: ListFlags.PAUSED,
            DomainState.SHUTOFF: ListFlags.SHUTOFF,
        }
        tests.append(lambda domain: bool(named.get(domain.state, ListFlags.OTHER) & states))
    return tests


def select(domains: list[DomainObject], flags: int) -> list[DomainObject]:
    """The machines that `flags` (virConnectListAllDomainsFlags) ask for."""
    for test in _filter(flags):
        domains = [domain for domain in domains if test(domain)]
    return domains


def list_all_domains(connection: Connection, args: Any) -> tuple[Any, int]:
    need_results, flags = args
    check_flags(flags, ListFlags.mask(), "list of domains")
    domains = select(connection.manager.domains(), flags)
    if not need_results:
        return ([], len(domains))
    if len(domains) > LIST_MAX:
        raise OperationUnsupported(f"{len(domains)} machines do not fit into one answer (at most {LIST_MAX})")
    return (references(domains), len(domains))


def list_domains(connection: Connection, args: Any) -> tuple[list[int]]:
    ids = [domain.id for domain in connection.manager.domains() if domain.id >= 0]
    return (ids[: _limit(args[0])],)


def list_defined_domains(connection: Connection, args: Any) -> tuple[list[str]]:
    names = [domain.name for domain in connection.manager.domains() if domain.id < 0]
    return (names[: _limit(args[0])],)


def _limit(wanted: int) -> int:
    if wanted < 0:
        raise InvalidArgument(f"a negative number of entries ({wanted}) was asked for")
    return min(wanted, LIST_MAX)


def num_of_domains(connection: Connection, args: Any) -> tuple[int]:
    return (sum(domain.id >= 0 for domain in connection.manager.domains()),)


def num_of_defined_domains(connection: Connection, args: Any) -> tuple[int]:
    return (sum(domain.id < 0 for domain in connection.manager.domains()),)


# --- looking ----------------------------------------------------------------------------------------------------------


def is_active(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.domain(args[0]).id >= 0),)


def is_persistent(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.domain(args[0]).persistent),)


def is_updated(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.domain(args[0]).updated),)


def get_info(connection: Connection, args: Any) -> tuple[int, int, int, int, int]:
    return connection.domain(args[0]).info()


def get_state(connection: Connection, args: Any) -> tuple[int, int]:
    check_flags(args[1], 0, "domain state")
    domain = connection.domain(args[0])
    return (domain.state, domain.reason)


def get_xml(connection: Connection, args: Any) -> tuple[str]:
    flags = args[1]
    check_flags(flags, DomainXMLFlags.mask(), "domain document")
    if flags & (DomainXMLFlags.SECURE | DomainXMLFlags.MIGRATABLE) and connection.access < Access.WRITE:
        raise OperationDenied("a read-only connection may not see passwords")
    return (connection.domain(args[0]).xml(flags),)


def get_os_type(connection: Connection, args: Any) -> tuple[str]:
    return (connection.domain(args[0]).os_type,)


def get_autostart(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.domain(args[0]).autostart),)


def get_max_memory(connection: Connection, args: Any) -> tuple[int]:
    return (connection.domain(args[0]).info().max_mem_kib,)


def get_control_info(connection: Connection, args: Any) -> tuple[int, int, int]:
    check_flags(args[1], 0, "domain control")
    domain = connection.domain(args[0])
    require_active(domain)
    job = domain.job_info()
    busy = bool(job.get("type"))
    return (int(busy), 0, int(job.get("elapsed_ms", 0)) if busy else 0)  # virDomainControlState OK or JOB


MESSAGES_DOCUMENT, MESSAGES_STATE = 1, 2  # where libvirt has deprecations and taints
MESSAGES_MAX = 2048  # the protocol's limit of the list


def get_messages(connection: Connection, args: Any) -> tuple[list[str]]:
    """What a user should know: why the machine is in the state it is in, and what its document warns of."""
    domain = connection.domain(args[0])
    check_flags(args[1], MESSAGES_DOCUMENT | MESSAGES_STATE, "domain messages")
    wanted = args[1] or MESSAGES_DOCUMENT | MESSAGES_STATE
    found = [domain.reason_text] if domain.reason_text and wanted & MESSAGES_STATE else []
    if wanted & MESSAGES_DOCUMENT:
        found += domain.definition.warnings()
    return (found[:MESSAGES_MAX],)


# --- life cycle -------------------------------------------------------------------------------------------------------

CREATE_FLAGS = DomainCreateFlags.mask()


async def define_xml(connection: Connection, args: Any) -> tuple[Any]:
    return (reference(await connection.manager.define(args[0])),)


async def define_xml_flags(connection: Connection, args: Any) -> tuple[Any]:
    xml, flags = args
    check_flags(flags, DomainDefineFlags.mask(), "define")
    return (reference(await connection.manager.define(xml, validate=bool(flags & DomainDefineFlags.VALIDATE))),)


async def undefine(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).undefine()


async def undefine_flags(connection: Connection, args: Any) -> None:
    check_flags(args[1], DomainUndefineFlags.mask(), "undefine")
    await connection.domain(args[0]).undefine(args[1])


async def _start(connection: Connection, domain: DomainObject, flags: int, files: tuple[int, ...]) -> None:
    check_flags(flags, CREATE_FLAGS, "start")
    passed = {str(index): fd for index, fd in enumerate(files)}
    names = [key for key in connection.associated if key[0] == domain.uuid]
    for key in names:
        group = connection.associated[key]
        passed[key[1]] = group[0]
        passed.update({f"{key[1]}:{index}": fd for index, fd in enumerate(group) if index})
    owner = None
    if flags & DomainCreateFlags.START_AUTODESTROY:
        owner = connection
        connection.owns_machines = True
    await domain.start(
        paused=bool(flags & DomainCreateFlags.START_PAUSED), flags=flags, files=passed or None, autodestroy=owner
    )
    if connection.closed and owner is not None:  # it left while the machine started
        await connection.manager.client_gone(connection)


async def create(connection: Connection, args: Any) -> None:
    await _start(connection, connection.domain(args[0]), 0, ())


async def create_with_flags(connection: Connection, args: Any) -> tuple[Any]:
    domain = connection.domain(args[0])
    await _start(connection, domain, args[1], ())
    return (reference(domain),)


async def create_with_files(connection: Connection, args: Any, call: Any) -> tuple[Any]:
    domain = connection.domain(args[0])
    await _start(connection, domain, args[1], call.fds)
    return (reference(domain),)


async def _create_xml(connection: Connection, xml: str, flags: int, files: tuple[int, ...]) -> tuple[Any]:
    check_flags(flags, CREATE_FLAGS, "create")
    owner = None
    if flags & DomainCreateFlags.START_AUTODESTROY:
        owner = connection
        connection.owns_machines = True
    domain = await connection.manager.create_xml(
        xml,
        paused=bool(flags & DomainCreateFlags.START_PAUSED),
        validate=bool(flags & DomainCreateFlags.START_VALIDATE),
        files={str(index): fd for index, fd in enumerate(files)} or None,
        autodestroy=owner,
        reset_nvram=bool(flags & DomainCreateFlags.START_RESET_NVRAM),
    )
    if connection.closed and owner is not None:
        await connection.manager.client_gone(connection)
    return (reference(domain),)


async def create_xml(connection: Connection, args: Any) -> tuple[Any]:
    return await _create_xml(connection, args[0], args[1], ())


async def create_xml_with_files(connection: Connection, args: Any, call: Any) -> tuple[Any]:
    return await _create_xml(connection, args[0], args[1], call.fds)


def fd_associate(connection: Connection, args: Any, call: Any) -> None:
    """Descriptors that the machine's next starts may use by `name`; kept while the client is connected."""
    import os

    reference_, name, flags = args
    check_flags(flags, 3, "descriptor association")
    domain = connection.domain(reference_)
    if not call.fds:
        raise InvalidArgument("no descriptors came with the call")
    key = (domain.uuid, name)
    if key not in connection.associated and len(connection.associated) >= 256:
        raise InvalidArgument("too many associated descriptor groups (at most 256)")
    for old in connection.associated.pop(key, ()):
        os.close(old)
    connection.associated[key] = tuple(os.dup(fd) for fd in call.fds)


async def destroy(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).destroy()


async def destroy_flags(connection: Connection, args: Any) -> None:
    check_flags(args[1], DomainDestroyFlags.mask(), "destroy")
    await connection.domain(args[0]).destroy(graceful=bool(args[1] & DomainDestroyFlags.GRACEFUL))


async def shutdown(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).shutdown()


async def shutdown_flags(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).shutdown(args[1])


async def reboot(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).reboot(args[1])


async def reset(connection: Connection, args: Any) -> None:
    check_flags(args[1], 0, "reset")
    await connection.domain(args[0]).reset()


async def suspend(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).suspend()


async def resume(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).resume()


async def rename(connection: Connection, args: Any) -> tuple[int]:
    reference_, new, flags = args
    check_flags(flags, 0, "rename")
    if not new:
        raise InvalidArgument("a machine needs a name")
    await connection.domain(reference_).rename(new)
    return (0,)


async def set_autostart(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).set_autostart(bool(args[1]))


async def inject_nmi(connection: Connection, args: Any) -> None:
    check_flags(args[1], 0, "NMI")
    await connection.domain(args[0]).inject_nmi()


async def send_key(connection: Connection, args: Any) -> None:
    reference_, codeset, hold, keycodes, flags = args
    check_flags(flags, 0, "send-key")
    await connection.domain(reference_).send_key(codeset, hold, keycodes)


# --- jobs -------------------------------------------------------------------------------------------------------------


STATS_COMPLETED, STATS_KEEP_COMPLETED = 1, 2  # virDomainGetJobStatsFlags
DISK_FIGURES = ("disk_total", "disk_processed", "disk_remaining")


def get_job_info(connection: Connection, args: Any) -> tuple[int, ...]:
    job = connection.domain(args[0]).job_info()
    kind = int(job.get("type", 0))
    elapsed = int(job.get("elapsed_ms", 0)) if kind else 0
    done, total = (int(job.get("done", 0)), int(job.get("total", 0))) if kind else (0, 0)
    memory = (total, done, total - done)
    disks = tuple(int(job.get(name, 0)) for name in DISK_FIGURES)
    data = tuple(map(sum, zip(memory, disks, strict=True)))
    return (kind, elapsed, 0, *data, *memory, *disks)


def get_job_stats(connection: Connection, args: Any) -> tuple[int, list[Any]]:
    from kvik.daemon.handlers.common import INT, ULLONG, params

    check_flags(args[1], STATS_COMPLETED | STATS_KEEP_COMPLETED, "job statistics")
    domain = connection.domain(args[0])
    if args[1] & STATS_COMPLETED:
        return _completed_job(domain, keep=bool(args[1] & STATS_KEEP_COMPLETED))
    job = domain.job_info()
    kind = int(job.get("type", 0))
    if not kind:
        return (0, [])
    rows = [("operation", INT, int(job.get("operation", 0))), ("time_elapsed", ULLONG, int(job.get("elapsed_ms", 0)))]
    done, total = int(job.get("done", 0)), int(job.get("total", 0))
    for kind_of in ("data", "memory") if total else ():
        figures = (("total", total), ("processed", done), ("remaining", total - done))
        rows += [(f"{kind_of}_{name}", ULLONG, value) for name, value in figures]
    rows += [(name, ULLONG, int(job[name])) for name in DISK_FIGURES if name in job]
    return (kind, params(*rows))


def _completed_job(domain: DomainObject, *, keep: bool) -> tuple[int, list[Any]]:
    """Of the last job that ended; told once unless it is to be kept."""
    from kvik.daemon.handlers.common import INT, STRING, ULLONG, params

    if domain.completed_job is None:
        return (0, [])
    kind, figures = domain.completed_job
    if not keep:
        domain.completed_job = None
    rows = [("operation", INT, figures["operation"])]
    rows += [(name, ULLONG, figures[name]) for name in ("time_elapsed", *DISK_FIGURES) if name in figures]
    rows += [("errmsg", STRING, figures["errmsg"])] if "errmsg" in figures else []
    return (kind, params(*rows))


async def abort_job(connection: Connection, args: Any) -> None:
    domain = connection.domain(args[0])
    require_active(domain)
    if domain.run is not None and domain.run.backup is not None:
        await backup_job.abort(domain)
        return
    job = domain.job_info()
    if not job.get("type"):
        raise OperationInvalid(f"no job is active on machine '{domain.name}'")
    current = domain.jobs.current
    if current is not None and current.cancel is not None:
        current.cancel()
        return
    raise OperationUnsupported(f"the job '{job.get('name', '')}' of machine '{domain.name}' cannot be given up")


# --- what there is none of yet ----------------------------------------------------------------------------------------


def get_launch_security_info(connection: Connection, args: Any) -> tuple[list[Any]]:
    check_flags(args[1], 0, "launch security")
    connection.domain(args[0])
    return ([],)


def get_security_label(connection: Connection, args: Any) -> tuple[list[int], int]:
    connection.domain(args[0])
    return ([0], 0)  # an empty C string: no label


def get_security_label_list(connection: Connection, args: Any) -> tuple[list[Any], int]:
    connection.domain(args[0])
    return ([], 0)
