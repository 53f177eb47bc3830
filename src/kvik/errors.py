"""Every error that kvik raises on purpose, in one tree.

KvikError
├── InvalidArgument           a value the caller gave is wrong
│   └── ConfigError           a document is wrong (knows its line and path)
│       └── ConfigUnsupported a document asks for what this hypervisor or host cannot do
├── NotFound                  the named object does not exist
│   ├── NoDomain, NoNetwork, NoNetworkPort, NoFilter, NoFilterBinding, NoInterface,
│   └── NoStoragePool, NoStorageVolume, NoSnapshot, NoCheckpoint, NoBackup, NoSecret, NoMetadata, NoDevice
├── AlreadyExists             a name, UUID or address is taken
│   └── StorageVolumeExists
├── StorageProbeFailed        what a pool is to be made of is not what its document says
├── StoragePoolBuilt          building a pool would overwrite what is there
├── InvalidSecret             a secret is private, or of another kind
├── OperationInvalid          the object is not in a state that allows this
├── OperationUnsupported      nobody could do this here
│   └── NoSupport             the procedure itself is unknown
├── OperationFailed           it was tried and did not work
│   ├── CheckpointInconsistent  what changed since a checkpoint is not known (any more)
│   └── ImageError            a kernel, disk or package file is damaged, or of a kind that is not read
├── OperationTimeout          it did not finish within its deadline
├── ResourceBusy              somebody else holds it
├── AccessDenied              the caller may not
├── AuthenticationFailed      the caller is not who it says
├── HostError                 the host refused (errno kept)
│   ├── DBusError             a service on the system's D-Bus refused (knows the error's name)
│   └── MissingPackages       software of the distribution is missing (knows the command that installs it)
├── HypervisorError           the VMM failed or answered nonsense
│   ├── MonitorError          QMP returned an error
│   └── AgentError            the guest agent is absent, silent or refused
├── RpcError                  bytes on the wire are not what the protocol allows
└── ConnectError              the daemon cannot be reached

A message says what failed, on which object and why; `remedy` says what to do next. `code` is the number of
libvirt's `virErrorNumber` (https://libvirt.org/html/libvirt-virterror.html) that clients of the wire
protocol test for; `domain` is its `virErrorDomain`.
"""

from __future__ import annotations

__all__ = [
    "AccessDenied",
    "AgentError",
    "AlreadyExists",
    "AuthenticationFailed",
    "CheckpointInconsistent",
    "ConfigError",
    "ConfigUnsupported",
    "ConnectError",
    "DBusError",
    "HostError",
    "HypervisorError",
    "ImageError",
    "InvalidArgument",
    "InvalidSecret",
    "KvikError",
    "MissingPackages",
    "MonitorError",
    "NoBackup",
    "NoCheckpoint",
    "NoDevice",
    "NoDomain",
    "NoFilter",
    "NoFilterBinding",
    "NoInterface",
    "NoMetadata",
    "NoNetwork",
    "NoNetworkPort",
    "NoSecret",
    "NoSnapshot",
    "NoStoragePool",
    "NoStorageVolume",
    "NoSupport",
    "NotFound",
    "OperationFailed",
    "OperationInvalid",
    "OperationTimeout",
    "OperationUnsupported",
    "ResourceBusy",
    "RpcError",
    "StoragePoolBuilt",
    "StorageProbeFailed",
    "StorageVolumeExists",
]


class KvikError(Exception):
    """Base of all deliberate errors.

    `message` is one sentence: what failed, on which object, why. `remedy`, if known, is what the user can do
    about it. `str(error)` joins the two.
    """

    code: int = 1  # VIR_ERR_INTERNAL_ERROR
    domain: int = 10  # VIR_FROM_QEMU
    exit_code: int | None = None  # of a command that ends with this error, where that is not the usual one

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class InvalidArgument(KvikError):
    code = 8


class ConfigError(InvalidArgument):
    """A document is wrong. `line` counts from 1 (0: unknown); `path` is like `/domain/devices/disk[2]`."""

    code = 27
    domain = 20

    def __init__(self, message: str, *, line: int = 0, path: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.line = line
        self.path = path

    def __str__(self) -> str:
        where = ", ".join(
            part for part in (f"line {self.line}" if self.line else "", f"at {self.path}" if self.path else "") if part
        )
        text = f"{where}: {self.message}" if where else self.message
        return f"{text}; {self.remedy}" if self.remedy else text


class ConfigUnsupported(ConfigError):
    code = 67


class NotFound(KvikError):
    code = 42


class NoDomain(NotFound):
    code = 42


class NoNetwork(NotFound):
    code = 43
    domain = 19


class NoNetworkPort(NotFound):
    code = 107
    domain = 19


class NoInterface(NotFound):
    code = 57  # VIR_ERR_NO_INTERFACE
    domain = 26  # VIR_FROM_INTERFACE


class NoFilter(NotFound):
    code = 62  # VIR_ERR_NO_NWFILTER
    domain = 33  # VIR_FROM_NWFILTER


class NoFilterBinding(NotFound):
    code = 101  # VIR_ERR_NO_NWFILTER_BINDING
    domain = 33


class NoStoragePool(NotFound):
    code = 49
    domain = 18


class NoSecret(NotFound):
    code = 66  # VIR_ERR_NO_SECRET
    domain = 30  # VIR_FROM_SECRET


class NoStorageVolume(NotFound):
    code = 50
    domain = 18


class NoSnapshot(NotFound):
    code = 72


class NoCheckpoint(NotFound):
    code = 103


class NoBackup(NotFound):
    code = 104


class NoMetadata(NotFound):
    code = 80


class NoDevice(NotFound):
    code = 99


class AlreadyExists(KvikError):
    code = 9


class StorageVolumeExists(AlreadyExists):
    code = 90
    domain = 18


class StorageProbeFailed(KvikError):
    """What a pool is to be made of is not what its document says."""

    code = 75  # VIR_ERR_STORAGE_PROBE_FAILED


class StoragePoolBuilt(KvikError):
    """Building a pool would overwrite what is there."""

    code = 76  # VIR_ERR_STORAGE_POOL_BUILT


class InvalidSecret(KvikError):
    code = 65  # VIR_ERR_INVALID_SECRET
    domain = 30  # VIR_FROM_SECRET


class OperationInvalid(KvikError):
    code = 55


class OperationUnsupported(KvikError):
    code = 84


class NoSupport(OperationUnsupported):
    code = 3


class OperationFailed(KvikError):
    code = 9


class CheckpointInconsistent(OperationFailed):
    """What changed since a checkpoint is not known (any more): an incremental backup from it would lack data."""

    code = 109  # VIR_ERR_CHECKPOINT_INCONSISTENT


class ImageError(OperationFailed):
    """A kernel, disk or package file is damaged, hostile, or of a kind that is not read here.

    `file` is the path it was opened by, `offset` the byte at which the fault lies (None: no one place).
    """

    def __init__(self, message: str, *, file: str = "", offset: int | None = None, remedy: str = "") -> None:
        where = f"{file}: " if file else ""
        at = f" (at byte {offset:#x})" if offset is not None else ""
        super().__init__(f"{where}{message}{at}", remedy=remedy)
        self.file = file
        self.offset = offset


class OperationTimeout(KvikError):
    code = 68


class ResourceBusy(KvikError):
    code = 87


class AccessDenied(KvikError):
    code = 88


class AuthenticationFailed(KvikError):
    code = 45
    domain = 7


class HostError(KvikError):
    """The host's kernel or a host tool refused. `errno` is 0 when there is none."""

    code = 38

    def __init__(self, message: str, *, errno: int = 0, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.errno = errno


class DBusError(HostError):
    """A service on the system's D-Bus refused; `name` is the error's, as the service has it."""

    def __init__(self, message: str, *, name: str = "", errno: int = 0, remedy: str = "") -> None:
        super().__init__(message, errno=errno, remedy=remedy)
        self.name = name


class MissingPackages(HostError):
    """Packages of the distribution are missing and were not installed.

    `packages` are their names; `command` installs them when root runs it. A command line ends with `exit_code`.
    """

    exit_code = 77

    def __init__(
        self, message: str, *, packages: tuple[str, ...] = (), command: str = "", errno: int = 0, remedy: str = ""
    ) -> None:
        super().__init__(message, errno=errno, remedy=remedy or (f"run: {command}" if command else ""))
        self.packages = packages
        self.command = command


class HypervisorError(KvikError):
    code = 1


class MonitorError(HypervisorError):
    """QMP answered with an error. `qmp_class` is its class, such as `GenericError` or `CommandNotFound`."""

    def __init__(self, message: str, *, qmp_class: str = "GenericError", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.qmp_class = qmp_class


class AgentError(HypervisorError):
    code = 86


class RpcError(KvikError):
    code = 39
    domain = 7


class ConnectError(KvikError):
    code = 38
    domain = 7
