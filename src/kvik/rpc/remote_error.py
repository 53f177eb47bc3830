"""KvikError <-> remote_error, the payload of every failed answer.

`message` is the whole text, so that any client shows what failed and what to do. The parts travel beside it where
libvirt keeps its own details: str1 the message alone, str2 the remedy, str3 the class (and a document's path after a
colon), int1 a document's line or the host's errno. From libvirt's own daemon str3 names no class of ours: there the
code decides.
"""

from __future__ import annotations

from kvik import errors
from kvik.errors import ConfigError, HostError, KvikError, NoSupport, RpcError
from kvik.rpc.xdr import Codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

LEVEL_ERROR: Final = 2
TEXT_MAX: Final = 65536  # of each string; far below the protocol's limit: nobody reads more

_STRUCTS: Final = {
    "domain": "name:string uuid:opaque[16] id:int",
    "network": "name:string uuid:opaque[16]",
}
CODEC: Final = Codec(
    "remote_error",
    "code:int domain:int message:string? level:int dom:domain? str1:string? str2:string? str3:string? "
    "int1:int int2:int net:network?",
    _STRUCTS,
)
_CLASSES: Final[dict[str, type[KvikError]]] = {name: getattr(errors, name) for name in errors.__all__}
_BY_CODE: Final[dict[int, type[KvikError]]] = {
    3: errors.NoSupport,
    8: errors.InvalidArgument,
    9: errors.OperationFailed,
    27: errors.ConfigError,
    38: errors.HostError,
    39: errors.RpcError,
    42: errors.NoDomain,
    43: errors.NoNetwork,
    107: errors.NoNetworkPort,
    45: errors.AuthenticationFailed,
    49: errors.NoStoragePool,
    50: errors.NoStorageVolume,
    55: errors.OperationInvalid,
    62: errors.NoFilter,
    65: errors.InvalidSecret,
    66: errors.NoSecret,
    67: errors.ConfigUnsupported,
    68: errors.OperationTimeout,
    72: errors.NoSnapshot,
    80: errors.NoMetadata,
    84: errors.OperationUnsupported,
    86: errors.AgentError,
    87: errors.ResourceBusy,
    88: errors.AccessDenied,
    99: errors.NoDevice,
    101: errors.NoFilterBinding,
    103: errors.NoCheckpoint,
    104: errors.NoBackup,
    109: errors.CheckpointInconsistent,
}
# How daemons say that they lack a program or procedure: ours (the first is libvirt's too), and libvirt's.
UNKNOWN: Final = ("unknown procedure", "unknown program", "Cannot find program")


def _text(value: str) -> str:
    # Errors may quote what a guest, a file name or a hostile document said: always encodable, never endless.
    return value[:TEXT_MAX].replace("\0", "\\0").encode(errors="backslashreplace").decode()


def encode_error(error: BaseException) -> bytes:
    """Any exception -> remote_error. What is not a KvikError is a defect: code 1, and only its class and text."""
    if not isinstance(error, KvikError):
        message = f"internal error: {type(error).__name__}: {error}"
        return CODEC.encode((1, 7, _text(message), LEVEL_ERROR, None, _text(message), None, None, 0, 0, None))
    code, domain, kind, number = error.code, error.domain, type(error).__name__, 0
    if isinstance(error, NoSupport) and error.message.startswith(UNKNOWN):
        # What libvirt's daemon answers, and what its clients turn into "not supported": any other code or domain
        # makes even their opening sequence fail.
        code, domain = RpcError.code, RpcError.domain
    if isinstance(error, ConfigError):
        kind, number = f"{kind}:{error.path}", error.line
    elif isinstance(error, HostError):
        number = error.errno
    return CODEC.encode(
        (
            code,
            domain,
            _text(str(error)),
            LEVEL_ERROR,
            None,
            _text(error.message),
            _text(error.remedy) or None,
            _text(kind),
            number,
            0,
            None,
        )
    )


def decode_error(payload: bytes) -> KvikError:
    """remote_error -> the exception to raise. Code and domain are the peer's, whatever class they map to."""
    record = CODEC.decode(payload, 0, len(payload))
    code, domain, message, _, _, part, remedy, kind, number, _, _ = record
    name, _, path = (kind or "").partition(":")
    cls = _CLASSES.get(name)
    if cls is None:
        cls, part, remedy, number, path = _BY_CODE.get(code, KvikError), message, "", 0, ""
        if code == RpcError.code and (message or "").startswith(UNKNOWN):
            cls = NoSupport
    extra: dict[str, Any] = {}
    if issubclass(cls, ConfigError):
        extra = {"line": number, "path": path}
    elif issubclass(cls, HostError):
        extra = {"errno": number}
    error = cls(part or message or f"the daemon failed with code {code}", remedy=remedy or "", **extra)
    error.code = code
    error.domain = domain
    return error
