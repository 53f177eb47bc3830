"""Opening and closing a connection, and what it is connected to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kvik.daemon.dispatch import Access
from kvik.daemon.errors import NoConnection
from kvik.daemon.handlers.common import check_flags
from kvik.errors import AuthenticationFailed, InvalidArgument, OperationInvalid

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

SCHEMES = frozenset({"", "kvik", "qemu", "test"})
PATHS = frozenset({"", "/", "/system", "/session", "/embed", "/default"})
OPEN_READ_ONLY = 1  # VIR_CONNECT_RO
OPEN_FLAGS = 3  # and VIR_CONNECT_NO_ALIASES

# virDrvFeature numbers that are true here. The migration ones (1, 3 to 7, 12, 13) are not until there is migration.
REMOTE, FD_PASSING, TYPED_PARAM_STRING, KEEPALIVE, XML_MIGRATABLE = 2, 8, 9, 10, 11
EVENT_CALLBACK, CLOSE_CALLBACK, NETWORK_UPDATE_ORDER = 14, 15, 16
FEATURES = frozenset(
    {REMOTE, FD_PASSING, TYPED_PARAM_STRING, KEEPALIVE, XML_MIGRATABLE, EVENT_CALLBACK, CLOSE_CALLBACK}
    | {NETWORK_UPDATE_ORDER}
)

# The libvirt release whose behaviour we follow; clients choose calls by it.
LIBRARY_VERSION = 9_000_000
AUTH_NONE = 0
CPU_MODELS_MAX = 8192


def auth_list(connection: Connection, args: Any) -> tuple[list[int]]:
    return ([AUTH_NONE],)  # who connects is known from the socket (SO_PEERCRED)


def auth_unavailable(connection: Connection, args: Any) -> None:
    raise AuthenticationFailed("this socket needs no authentication")


def open_connection(connection: Connection, args: Any) -> None:
    name, flags = args
    if connection.access is not Access.ANYONE:
        raise OperationInvalid("the connection is open already")
    check_flags(flags, OPEN_FLAGS, "connect open")
    uri = name or ""
    if len(uri) > 4096:
        raise InvalidArgument("the URI is too long")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise InvalidArgument(f"'{uri}' is no URI: {error}") from error
    scheme = parts.scheme.partition("+")[0]
    if scheme not in SCHEMES or parts.path not in PATHS:
        raise NoConnection(f"no hypervisor is served here for '{uri}'", remedy="use qemu:///system or qemu:///session")
    if parts.path in ("", "/"):
        uri = f"qemu:///{connection.server.paths.scope}"
    connection.open(uri, Access.READ if flags & OPEN_READ_ONLY else Access.ADMIN)


def close_connection(connection: Connection, args: Any) -> None:
    """The client hangs up by itself once it has the answer."""


def supports_feature(connection: Connection, args: Any) -> tuple[int]:
    (feature,) = args
    if feature == KEEPALIVE:
        connection.start_keepalive()
    return (int(feature in FEATURES),)


def get_type(connection: Connection, args: Any) -> tuple[str]:
    return ("QEMU",)


async def get_version(connection: Connection, args: Any) -> tuple[int]:
    return (await connection.server.node.hypervisor_version(),)


def get_library_version(connection: Connection, args: Any) -> tuple[int]:
    return (LIBRARY_VERSION,)


def get_hostname(connection: Connection, args: Any) -> tuple[str]:
    return (connection.server.node.hostname(),)


def get_uri(connection: Connection, args: Any) -> tuple[str]:
    return (connection.uri,)


def get_sysinfo(connection: Connection, args: Any) -> tuple[str]:
    check_flags(args[0], 0, "sysinfo")
    return (connection.server.node.sysinfo(),)


async def get_max_vcpus(connection: Connection, args: Any) -> tuple[int]:
    return (await connection.server.node.max_vcpus(args[0] or "qemu"),)


async def get_capabilities(connection: Connection, args: Any) -> tuple[str]:
    return (await connection.server.node.capabilities(),)


async def get_domain_capabilities(connection: Connection, args: Any) -> tuple[str]:
    emulator, arch, machine, virttype, flags = args
    check_flags(flags, 0, "domain capabilities")
    return (
        await connection.server.node.domain_capabilities(arch or "", machine or "", virttype or "", emulator or ""),
    )


async def get_cpu_model_names(connection: Connection, args: Any) -> tuple[list[str], int]:
    arch, need_results, flags = args
    check_flags(flags, 0, "CPU model names")
    models = (await connection.server.node.cpu_models(arch))[:CPU_MODELS_MAX]
    return (models if need_results else [], len(models))


def compare_cpu(connection: Connection, args: Any) -> tuple[int]:
    xml, flags = args
    check_flags(flags, 3, "CPU comparison")
    return (connection.server.node.compare_cpu(xml, bool(flags & 1)),)


def compare_hypervisor_cpu(connection: Connection, args: Any) -> tuple[int]:
    _, _, _, _, xml, flags = args
    check_flags(flags, 3, "CPU comparison")
    return (connection.server.node.compare_cpu(xml, bool(flags & 1)),)


def baseline_cpu(connection: Connection, args: Any) -> tuple[str]:
    documents, flags = args
    check_flags(flags, 3, "CPU baseline")
    return (connection.server.node.baseline_cpu(documents),)


def baseline_hypervisor_cpu(connection: Connection, args: Any) -> tuple[str]:
    documents, flags = args[4], args[5]
    check_flags(flags, 3, "CPU baseline")
    return (connection.server.node.baseline_cpu(documents),)


def is_secure(connection: Connection, args: Any) -> tuple[int]:
    return (1,)  # a Unix socket never leaves the host


def register_close_callback(connection: Connection, args: Any) -> None:
    if connection.wants_close_callback:
        raise OperationInvalid("a close callback is registered already")
    connection.wants_close_callback = True


def unregister_close_callback(connection: Connection, args: Any) -> None:
    if not connection.wants_close_callback:
        raise OperationInvalid("no close callback is registered")
    connection.wants_close_callback = False


def _native(argument_format: str) -> None:
    if argument_format not in ("qemu-argv",):
        raise InvalidArgument(f"unsupported format '{argument_format}'", remedy="use qemu-argv")


async def domain_xml_to_native(connection: Connection, args: Any) -> tuple[str]:
    native_format, xml, flags = args
    check_flags(flags, 0, "domain to native")
    _native(native_format)
    return (await connection.server.node.native(xml),)
